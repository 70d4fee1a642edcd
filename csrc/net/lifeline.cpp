#include "net/lifeline.h"

#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <vector>

#include "algorithms/topology.h"
#include "base/error.h"
#include "base/thread.h"
#include "net/tcp.h"

namespace ringreduce {
namespace {

constexpr int look_around_ms = 20;
constexpr char lost_mark = '\0';  // begins the lifeline's own message: which node is lost
constexpr uint32_t largest_message_bytes = 1 << 16;
constexpr int64_t connect_limit_ns = 30'000'000'000;

std::string framed(const std::string& message) {
  const auto length = static_cast<uint32_t>(message.size());
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + message;
}

/// The connections of this process. A forked child gives them up at once: they must end with the
/// rank, though the child may live on.
struct Sockets {
  std::mutex mutex;
  std::set<int> open;
};

Sockets& own_sockets() {
  static auto* const sockets = [] {
    static auto* const made = new Sockets;  // never destroyed: threads may outlive main()
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                   [] {
                     for (const int socket : made->open) ::close(socket);
                     made->open.clear();
                     made->mutex.unlock();
                   });
    return made;
  }();
  return *sockets;
}

void note_opened(int socket) {
  Sockets& sockets = own_sockets();
  std::lock_guard lock(sockets.mutex);
  sockets.open.insert(socket);
}

void close_noted(int socket) {
  Sockets& sockets = own_sockets();
  std::lock_guard lock(sockets.mutex);
  sockets.open.erase(socket);
  ::close(socket);
}

}  // namespace

struct Lifeline::State {
  struct Connection {
    int socket, node;
    std::string received;
    bool leaving = false;  // has said goodbye
  };

  Events events;
  pid_t pid = getpid();

  // Held by the thread while it calls an event, so that none comes after close(). Taken first.
  std::mutex calling;
  std::mutex mutex;  // of what follows; sockets are read by the thread alone
  std::vector<Connection> connections;
  bool closed = false;

  std::vector<int> alarms;  // the thread's

  ~State() {
    if (pid != getpid()) return;  // a forked child has closed them
    for (const Connection& each : connections) close_noted(each.socket);
    for (const int alarm : alarms) ::close(alarm);
  }

  /// Messages are small beside a socket's buffer: what does not fit at once has nobody who reads
  /// it.
  void send_to_all_but(int socket, const std::string& message) {
    const std::string frame = framed(message);
    std::lock_guard lock(mutex);
    for (const Connection& each : connections) {
      if (each.socket == socket) continue;
      static_cast<void>(
          ::send(each.socket, frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT));
    }
  }

  bool is_closed() {
    std::lock_guard lock(mutex);
    return closed;
  }

  bool all_left() const {
    return std::all_of(connections.begin(), connections.end(),
                       [](const Connection& each) { return each.leaving; });
  }

  void run();
  void call(const std::function<void()>& event);
  void hear(const std::string& message);
  bool read(Connection& connection);
  bool deliver(Connection& connection);
  void drop(size_t index);
};

void Lifeline::State::run() {
  while (!is_closed() || !all_left()) {
    std::vector<pollfd> entries;
    for (const Connection& each : connections) entries.push_back({each.socket, POLLIN, 0});
    for (const int alarm : alarms) entries.push_back({alarm, POLLIN, 0});
    poll(entries.data(), entries.size(), look_around_ms);
    call(events.look_around);
    for (; entries.size() > connections.size(); entries.pop_back()) {
      if (entries.back().revents == 0) continue;
      std::erase(alarms, entries.back().fd);
      ::close(entries.back().fd);
    }
    for (size_t index = entries.size(); index-- > 0;) {
      if (entries[index].revents != 0 && !read(connections[index])) drop(index);
    }
  }
}

/// Not after close().
void Lifeline::State::call(const std::function<void()>& event) {
  const std::lock_guard lock(calling);
  if (!is_closed()) event();
}

void Lifeline::State::hear(const std::string& message) {
  call([&] {
    if (message.front() == lost_mark) {
      events.lost(std::stoi(message.substr(1)));
    } else {
      events.heard(message);
    }
  });
}

/// False: the connection has ended.
bool Lifeline::State::read(Connection& connection) {
  char buffer[4096];
  for (;;) {
    const ssize_t received = recv(connection.socket, buffer, sizeof(buffer), MSG_DONTWAIT);
    if (received > 0) {
      connection.received.append(buffer, static_cast<size_t>(received));
      if (!deliver(connection)) return false;
    } else {
      return received < 0 && (errno == EAGAIN || errno == EINTR);
    }
  }
}

/// What has come in whole. False: nonsense.
bool Lifeline::State::deliver(Connection& connection) {
  std::string& bytes = connection.received;
  for (uint32_t length; bytes.size() >= sizeof(length); bytes.erase(0, sizeof(length) + length)) {
    std::memcpy(&length, bytes.data(), sizeof(length));
    if (length > largest_message_bytes) return false;
    if (bytes.size() < sizeof(length) + length) return true;
    const std::string message = bytes.substr(sizeof(length), length);
    if (message.empty()) {
      connection.leaving = true;
    } else {
      send_to_all_but(connection.socket, message);
      hear(message);
    }
  }
  return true;
}

void Lifeline::State::drop(size_t index) {
  const Connection connection = connections[index];
  {
    std::lock_guard lock(mutex);
    connections.erase(connections.begin() + static_cast<long>(index));
  }
  close_noted(connection.socket);
  if (connection.leaving) return;
  const std::string message = lost_mark + std::to_string(connection.node);
  send_to_all_but(-1, message);
  hear(message);
}

Lifeline::Lifeline(int node, int nodes, bool leads, const Exchange& exchange, Events events,
                   Deadline deadline)
    : state_(std::make_shared<State>()) {
  state_->events = std::move(events);
  deadline.at_ns = std::min(deadline.at_ns, now_ns() + connect_limit_ns);
  const TreePlace place = InorderTree{nodes}.place(node);
  std::string failure, invitation;
  TcpListener listener;
  try {
    if (leads && place.num_children > 0) listener.open(place.num_children);
    if (leads) invitation = std::to_string(node) + " " + listener.invitation();
  } catch (const Error& error) {
    failure = error.what();
  }
  const std::vector<std::string> invitations = exchange(invitation);
  const auto invitation_of = [&](int wanted) {
    const std::string start = std::to_string(wanted) + " ";
    for (const std::string& each : invitations) {
      if (each.starts_with(start)) return each.substr(start.size());
    }
    return std::string();
  };
  try {
    if (leads && failure.empty()) {
      if (place.parent != -1) {
        const int socket = tcp_connect(invitation_of(place.parent), node, deadline);
        note_opened(socket);
        state_->connections.push_back({socket, place.parent, {}});
      }
      for (int child = 0; child < place.num_children; ++child) {
        const auto [socket, its_node] = listener.accept(deadline);
        note_opened(socket);
        state_->connections.push_back({socket, its_node, {}});
      }
    }
  } catch (const Error& error) {
    failure = error.what();
  }
  for (const std::string& text : exchange(failure)) {
    if (!text.empty()) throw Error(ErrorCode::resource, text);
  }
}

void Lifeline::start(std::vector<int> alarms) {
  state_->alarms = std::move(alarms);
  start_thread([state = state_] { state->run(); });
}

Lifeline::~Lifeline() { close(); }

void Lifeline::flood(const std::string& message) { state_->send_to_all_but(-1, message); }

void Lifeline::close() {
  // A forked child shares the sockets, but is not the rank: it has nothing to say here.
  if (state_->pid != getpid() || state_->is_closed()) return;
  state_->send_to_all_but(-1, "");
  const std::lock_guard calling(state_->calling);
  const std::lock_guard lock(state_->mutex);
  state_->closed = true;
}

}  // namespace ringreduce
