#include "shm/node.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <utility>

#include "base/error.h"
#include "shm/cores.h"
#include "shm/socket.h"

namespace ringreduce {
namespace {

// Segments for which the machine is asked first whether it has the memory.
constexpr size_t large_segment_bytes = size_t{64} << 20;

/// Ranks with equal identities may share memory: one kernel, one network namespace (abstract
/// sockets live in it), one user; threads also one process. Only the nonce in a mapped segment
/// proves it.
std::string identity(bool in_process) {
  // Read once: without a file descriptor left, a rank would find itself on a node of its own.
  static const std::string boot = [] {
    std::string id;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
    return id;
  }();
  struct stat network{};
  stat("/proc/self/ns/net", &network);
  return boot + "/" + std::to_string(network.st_ino) + "/" + std::to_string(geteuid()) + "/" +
         (in_process ? std::to_string(getpid()) : "processes");
}

/// What `attempt` throws, as text; empty if it goes well.
template <class Attempt>
std::string failure_of(Attempt attempt) {
  try {
    attempt();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

/// A file descriptor, closed on every way out.
struct Node::Fd {
  int number = -1;

  Fd() = default;
  explicit Fd(int number) : number(number) {}
  ~Fd() {
    if (number >= 0) close(number);
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
};

Node::Node(int rank, int size, const Exchange& exchange, bool in_process, const std::string& host,
           Deadline deadline)
    : in_process_(in_process) {
  const std::string mine = identity(in_process) + "/" + host;
  const std::vector<std::string> identities = exchange(mine);
  const std::vector<std::string> masks = exchange(affinity_mask());
  std::vector<std::string> node_masks, seen;
  for (int peer = 0; peer < size; ++peer) {
    const std::string& theirs = identities[static_cast<size_t>(peer)];
    const size_t index =
        static_cast<size_t>(std::find(seen.begin(), seen.end(), theirs) - seen.begin());
    if (index == seen.size()) {
      seen.push_back(theirs);
      nodes_.emplace_back();
    }
    nodes_[index].push_back(peer);
    if (theirs != mine) continue;
    node_ = static_cast<int>(index);
    if (peer == rank) local_rank_ = static_cast<int>(nodes_[index].size()) - 1;
    node_masks.push_back(masks[static_cast<size_t>(peer)]);
  }
  try {
    connect(exchange, deadline);
    // One rank's quota speaks for all: mpirun's children share a cgroup. The smallest decides.
    int quota = cgroup_quota();
    for (const std::string& other : this->exchange(std::to_string(quota), deadline)) {
      quota = std::min(quota, std::stoi(other));
    }
    cores_ = std::min(quota, cores_in_union(node_masks.data(), local_size()));
  } catch (...) {
    close_sockets();
    throw;
  }
}

Node::~Node() { close_sockets(); }

void Node::close_sockets() {
  for (int socket : sockets_) {
    if (socket >= 0) close(socket);
  }
}

void Node::connect(const Exchange& exchange, Deadline deadline) {
  const bool leads = local_rank_ == 0;
  const std::string name = leads && local_size() > 1 ? random_name() : "";
  const Fd listener(name.empty() ? -1 : listen_on(name, local_size()));
  const std::string leader = exchange(name)[static_cast<size_t>(ranks()[0])];
  if (!leads) {
    const int32_t local_rank = local_rank_;
    sockets_.push_back(connect_to(leader, deadline));
    send_all(sockets_[0], &local_rank, sizeof(local_rank), deadline);
  }
  exchange("");  // all have connected: a rank that dies from here on shows as the end of its socket
  if (leads) {
    sockets_.assign(static_cast<size_t>(local_size()), -1);
    for (int peer = 1; peer < local_size(); ++peer) {
      Fd socket(accept_from(listener.number, deadline));
      int32_t local_rank = 0;
      receive_all(socket.number, &local_rank, sizeof(local_rank), deadline);
      if (local_rank < 1 || local_rank >= local_size() ||
          sockets_[static_cast<size_t>(local_rank)] != -1) {
        throw Error(ErrorCode::resource, "a process that is no rank of this job connected");
      }
      sockets_[static_cast<size_t>(local_rank)] = std::exchange(socket.number, -1);
    }
  }
}

std::vector<std::string> Node::exchange(const std::string& message, Deadline deadline) {
  std::vector<std::string> messages(static_cast<size_t>(local_size()));
  if (local_rank_ != 0) {
    send_message(sockets_[0], message, deadline);
    for (std::string& each : messages) each = receive_message(sockets_[0], deadline);
    return messages;
  }
  messages[0] = message;
  for (size_t peer = 1; peer < messages.size(); ++peer) {
    messages[peer] = receive_message(sockets_[peer], deadline);
  }
  for (size_t peer = 1; peer < messages.size(); ++peer) {
    for (const std::string& each : messages) send_message(sockets_[peer], each, deadline);
  }
  return messages;
}

/// All throw what any of them has failed with.
void Node::throw_alike(const std::string& failure, Deadline deadline) {
  const std::vector<std::string> failures = exchange(failure, deadline);
  for (size_t local = 0; local < failures.size(); ++local) {
    if (failures[local].empty()) continue;
    throw Error(ErrorCode::resource,
                "rank " + std::to_string(ranks()[local]) + ": " + failures[local]);
  }
}

/// Adds those of the other ranks, by local rank, to this one's.
void Node::exchange_fds(std::vector<Fd>& fds, Deadline deadline) {
  const auto me = static_cast<size_t>(local_rank_);
  if (me != 0) {
    send_fd(sockets_[0], fds[me].number, deadline);
    for (size_t peer = 0; peer < fds.size(); ++peer) {
      if (peer != me) fds[peer].number = receive_fd(sockets_[0], deadline);
    }
    return;
  }
  for (size_t peer = 1; peer < fds.size(); ++peer) {
    fds[peer].number = receive_fd(sockets_[peer], deadline);
  }
  for (size_t peer = 1; peer < fds.size(); ++peer) {
    for (size_t owner = 0; owner < fds.size(); ++owner) {
      if (owner != peer) send_fd(sockets_[peer], fds[owner].number, deadline);
    }
  }
}

/// Among processes: each maps the memfds of all.
void Node::share_memfds(Segment& segment, Deadline deadline) {
  std::vector<Fd> fds(segment.blocks.size());
  if (segment.size_bytes >= large_segment_bytes) {  // before any rank begins to take its part
    throw_alike(failure_of([&] { check_available(segment.size_bytes * fds.size()); }), deadline);
  }
  Fd& own = fds[static_cast<size_t>(local_rank_)];
  throw_alike(failure_of([&] { own.number = create_memfd(segment.size_bytes); }), deadline);
  exchange_fds(fds, deadline);
  throw_alike(failure_of([&] {
                for (size_t peer = 0; peer < fds.size(); ++peer) {
                  if (fds[peer].number < 0) {
                    throw Error(ErrorCode::resource,
                                "a peer's shared memory did not arrive: too many open files here, "
                                "or on the node's first rank (ulimit -n)");
                  }
                  segment.blocks[peer] = map_memfd(fds[peer].number, segment.size_bytes);
                }
              }),
              deadline);
}

/// Among threads of one process, or for one rank alone.
void Node::share_pages(Segment& segment, Deadline deadline) {
  std::shared_ptr<Memory>& own = segment.blocks[static_cast<size_t>(local_rank_)];
  throw_alike(failure_of([&] { own = allocate_pages(segment.size_bytes); }), deadline);
  // The addresses of the owners' pointers, which live until all have copied.
  const auto address = reinterpret_cast<uintptr_t>(&own);
  const std::vector<std::string> addresses = exchange(std::to_string(address), deadline);
  for (size_t peer = 0; peer < addresses.size(); ++peer) {
    if (static_cast<int>(peer) == local_rank_) continue;
    segment.blocks[peer] =
        *reinterpret_cast<std::shared_ptr<Memory>*>(std::stoull(addresses[peer]));
  }
  exchange("", deadline);
}

Segment Node::create_segment(size_t size_bytes, Deadline deadline) {
  Segment segment;
  segment.size_bytes = size_bytes;
  segment.blocks.resize(static_cast<size_t>(local_size()));
  if (in_process_ || local_size() == 1) {
    share_pages(segment, deadline);
  } else {
    share_memfds(segment, deadline);
  }
  return segment;
}

}  // namespace ringreduce
