#include "comm/cluster.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <sstream>

#include "base/error.h"

namespace ringreduce {
namespace {

// What a communicator takes of MPI's tags: a wire needs one per channel, one of rings only one.
constexpr int agreement_tags = 0, leaders_tags = 1, rail_tags = leaders_tags + num_channels,
              all_ranks_tags = rail_tags + num_channels,
              device_rail_tags = all_ranks_tags + num_channels,
              tags_per_communicator = device_rail_tags + 1;

/// Grows by one with every communicator that this process has been a member of.
std::atomic<int> next_communicator{0};

constexpr char aborted_mark = 'A', departed_mark = 'D', question_mark = 'Q';

int smallest_node(const std::vector<std::vector<int>>& ranks) {
  size_t smallest = ranks.front().size();
  for (const std::vector<int>& node : ranks) smallest = std::min(smallest, node.size());
  return static_cast<int>(smallest);
}

/// Collective. Throws on all ranks what one of them fails with.
Network open_on_all_ranks(const OpenNetwork& open_network, const Exchange& exchange, int rank,
                          int nodes) {
  Network network;
  std::string failure;
  try {
    if (!open_network) {
      throw Error(ErrorCode::resource,
                  "the ranks are on " + std::to_string(nodes) +
                      " hosts, and between hosts ringreduce needs MPI: start them with mpirun");
    }
    network = open_network();
  } catch (const std::exception& error) {
    failure = "rank " + std::to_string(rank) + ": " + error.what();
  }
  for (const std::string& text : exchange(failure)) {
    if (!text.empty()) throw Error(ErrorCode::resource, text);
  }
  return network;
}

/// Collective. Of the tags that no rank has used: past all the communicators that any of them
/// has been a member of.
int first_unused_tag(const Exchange& exchange, int max_tag) {
  int communicator = 0;
  for (const std::string& each : exchange(std::to_string(next_communicator.load()))) {
    communicator = std::max(communicator, std::stoi(each));
  }
  next_communicator.store(communicator + 1);
  if (communicator >= max_tag / tags_per_communicator) {
    throw Error(ErrorCode::resource, "this process has been a member of " +
                                         std::to_string(communicator) +
                                         " communicators across hosts, and MPI's tags are used up");
  }
  return communicator * tags_per_communicator;
}

/// For each other process of this node, a descriptor that tells of its end; where the kernel has
/// none, as for a process that it does not show us, the look around every 20 ms finds out.
std::vector<int> ends_of_ranks(const Group& group) {
  std::vector<int> ends;
  for (int local = 0; local < group.size(); ++local) {
    const pid_t pid = group.control(local).pid.load();
    const int end = pid == getpid() ? -1 : static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
    if (end >= 0) ends.push_back(end);
  }
  return ends;
}

}  // namespace

Cluster::Cluster(const Node& node, Group& group, int rank, const Exchange& exchange,
                 const OpenNetwork& open_network, Deadline deadline)
    : group_(group),
      node_(node.node()),
      ranks_(node.nodes()),
      rails_(smallest_node(ranks_)),
      engine_(std::make_shared<Engine>()),
      departure_told_(static_cast<size_t>(group.size())) {
  const Network network = open_on_all_ranks(open_network, exchange, rank, nodes());
  const int first_tag = first_unused_tag(exchange, network.mpi->max_tag);
  const std::vector<int> numbers = learn_numbers(exchange, network);
  std::vector<int> leader_numbers, rail_numbers;
  for (const std::vector<int>& members : ranks_) {
    leader_numbers.push_back(numbers[static_cast<size_t>(members[0])]);
    const size_t place = carries() ? static_cast<size_t>(group.rank()) : 0;
    rail_numbers.push_back(numbers[static_cast<size_t>(members[place])]);
  }
  agreement_ =
      std::make_unique<Agreement>(network.mpi, leader_numbers, node_, first_tag + agreement_tags);
  leaders_ =
      std::make_unique<NetWire>(network.mpi, leader_numbers, node_, first_tag + leaders_tags);
  rail_ = std::make_unique<NetWire>(network.mpi, rail_numbers, node_, first_tag + rail_tags);
  all_ranks_ = std::make_unique<NetWire>(network.mpi, numbers, rank, first_tag + all_ranks_tags);
  make_device_rail_ = [this, mpi = network.mpi, rail_numbers, first_tag](WireDevice& device) {
    return std::make_unique<NetWire>(mpi, rail_numbers, node_, first_tag + device_rail_tags,
                                     &device);
  };
  Lifeline::Events events{[this](const std::string& message) { heard(message); },
                          [this](int other) { lost(other); }, [this] { look_around(); }};
  lifeline_ =
      std::make_unique<Lifeline>(node_, nodes(), leads(), exchange, std::move(events), deadline);
  group_.set_remote(this);
  if (leads()) lifeline_->start(ends_of_ranks(group));
}

NodesShape Cluster::shape() const {
  size_t largest = 0;
  for (const std::vector<int>& node : ranks_) largest = std::max(largest, node.size());
  return {nodes(), static_cast<int>(largest), rails_};
}

void Cluster::open_device_rail(WireDevice& device) { device_rail_ = make_device_rail_(device); }

/// MPI's numbers of all ranks; the names of all hosts; and whether all take device memory.
std::vector<int> Cluster::learn_numbers(const Exchange& exchange, const Network& network) {
  const std::vector<std::string> cards =
      exchange(std::to_string(network.rank) + (network.mpi->takes_device_memory ? " 1 " : " 0 ") +
               host_name());
  std::vector<int> numbers;
  std::vector<std::string> hosts;
  for (const std::string& card : cards) {
    std::istringstream words(card);
    bool takes = false;
    words >> numbers.emplace_back() >> takes >> hosts.emplace_back();
    takes_device_memory_ = takes_device_memory_ && takes;
  }
  for (const std::vector<int>& members : ranks_) {
    hosts_.push_back(hosts[static_cast<size_t>(members[0])]);
  }
  return numbers;
}

void Cluster::heard(const std::string& message) {
  std::istringstream words(message.substr(1));
  if (message[0] == aborted_mark) {
    AbortRecord record;
    int code = 0;
    words >> code >> record.culprit >> record.detector;
    words.get();
    std::getline(words, record.reason, '\0');
    record.code = static_cast<ErrorCode>(code);
    {
      std::lock_guard lock(mutex_);
      abort_told_ = true;  // those who told us tell the others
    }
    group_.abort(record);
    say_abort();
  } else if (message[0] == departed_mark) {
    Departed departed{};
    words >> departed.number >> departed.last;
    std::lock_guard lock(mutex_);
    departed_.push_back(departed);
    any_departed_.store(true, std::memory_order_release);
  } else if (message[0] == question_mark) {
    uint64_t sequence = 0;
    double after_s = 0;
    words >> sequence >> after_s;
    const std::string missing = group_.missing(sequence);
    if (!missing.empty()) group_.abort(timed_out(group_, after_s, missing));
  }
}

void Cluster::lost(int node) {
  const int leader = ranks_[static_cast<size_t>(node)][0];
  if (!group_.aborted()) {
    std::lock_guard lock(mutex_);
    abort_told_ = true;  // the lifeline tells the others
  }
  group_.abort(ErrorCode::peer_failed, leader,
               "rank " + std::to_string(leader) + " (host " + hosts_[static_cast<size_t>(node)] +
                   ") is out of reach: its process or its host has ended, or the network is cut");
  say_abort();
}

/// On stderr, once for all of this host: of two ranks that lose a third one, Open MPI over TCP ends
/// one or both, within a millisecond and before they can raise anything. This thread goes on
/// meanwhile.
void Cluster::say_abort() {
  if (abort_said_ || !group_.aborted()) return;
  abort_said_ = true;
  const AbortRecord record = group_.abort_record();
  if (record.code != ErrorCode::peer_failed) return;
  std::string ranks;
  for (const int rank : ranks_[static_cast<size_t>(node_)]) {
    ranks += (ranks.empty() ? "" : ", ") + std::to_string(rank);
  }
  std::fprintf(stderr, "ringreduce: host %s (%s %s): %s\n",
               hosts_[static_cast<size_t>(node_)].c_str(), group_.size() > 1 ? "ranks" : "rank",
               ranks.c_str(), record.reason.c_str());
  std::fflush(stderr);
}

void Cluster::look_around() {
  if (!group_.aborted()) {
    // Deaths only: who departs in good order is missed by nobody yet.
    if (const std::optional<AbortRecord> record = group_.find_dead()) group_.abort(*record);
  }
  say_abort();
  tell_abort();
  tell_departures();
}

void Cluster::tell_abort() {
  if (!group_.aborted()) return;
  {
    std::lock_guard lock(mutex_);
    if (abort_told_) return;
    abort_told_ = true;
  }
  const AbortRecord record = group_.abort_record();
  lifeline_->flood(aborted_mark + std::to_string(static_cast<int>(record.code)) + " " +
                   std::to_string(record.culprit) + " " + std::to_string(record.detector) + " " +
                   record.reason);
}

void Cluster::tell_departures() {
  for (int local = 0; local < group_.size(); ++local) {
    const RankControl& control = group_.control(local);
    if (control.departed.load(std::memory_order_acquire) == 0) continue;
    {
      std::lock_guard lock(mutex_);
      if (departure_told_[static_cast<size_t>(local)]) continue;
      departure_told_[static_cast<size_t>(local)] = true;
    }
    lifeline_->flood(departed_mark + std::to_string(group_.number_of(local)) + " " +
                     std::to_string(last_seen(control)));
  }
}

std::optional<AbortRecord> Cluster::find_lost(uint64_t sequence) {
  if (!any_departed_.load(std::memory_order_acquire)) return std::nullopt;
  std::lock_guard lock(mutex_);
  for (const Departed& each : departed_) {
    if (each.last >= sequence) continue;
    return AbortRecord{ErrorCode::peer_failed, each.number, group_.number_of(group_.rank()),
                       "rank " + std::to_string(each.number) + " exited while others wait for it"};
  }
  return std::nullopt;
}

void Cluster::ask(uint64_t sequence, double after_s) {
  lifeline_->flood(question_mark + std::to_string(sequence) + " " + std::to_string(after_s));
}

void Cluster::close(bool idle) {
  engine_->stop();
  if (leads()) {
    tell_abort();
    tell_departures();
  }
  lifeline_->close();
  if (!idle || group_.aborted()) return;  // then MPI has the memory until it ends
  agreement_->close();
  for (NetWire* wire : {leaders_.get(), rail_.get(), all_ranks_.get()}) wire->close();
  device_rail_closed_ = device_rail_ && device_rail_->close();
}

}  // namespace ringreduce
