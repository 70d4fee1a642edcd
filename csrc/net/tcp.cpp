#include "net/tcp.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <vector>

#include "base/error.h"

namespace ringreduce {
namespace {

constexpr int64_t one_address_ns = 2'000'000'000;
constexpr int64_t handshake_ns = 10'000'000'000;

// A silent peer is gone after about two seconds: the kernel asks after one second of silence, and
// again every second; whoever has not answered for this long is given up.
constexpr int keepalive_s = 1, unanswered = 2, give_up_ms = 1800;

/// What a guest says first. The host answers with its own token.
struct Hello {
  char token[32];
  int32_t number;
};

[[noreturn]] void fail(const std::string& what) {
  throw Error(ErrorCode::resource, what + ": " + std::strerror(errno));
}

std::string random_token() {
  unsigned char bytes[sizeof(Hello::token) / 2];
  if (getrandom(bytes, sizeof(bytes), 0) != sizeof(bytes)) fail("no random numbers");
  std::string token;
  for (const unsigned char byte : bytes) {
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", byte);
    token += digits;
  }
  return token;
}

/// This host's addresses that others may reach; the loopback's last, for hosts that are one
/// machine.
std::vector<std::string> own_addresses() {
  std::vector<std::string> addresses, loopback;
  ifaddrs* first = nullptr;
  if (getifaddrs(&first) != 0) fail("cannot list this host's addresses");
  for (const ifaddrs* each = first; each != nullptr; each = each->ifa_next) {
    if (!each->ifa_addr || !(each->ifa_flags & IFF_UP)) continue;
    char text[INET6_ADDRSTRLEN];
    if (each->ifa_addr->sa_family == AF_INET) {
      const auto* address = reinterpret_cast<const sockaddr_in*>(each->ifa_addr);
      inet_ntop(AF_INET, &address->sin_addr, text, sizeof(text));
    } else if (each->ifa_addr->sa_family == AF_INET6) {
      const auto* address = reinterpret_cast<const sockaddr_in6*>(each->ifa_addr);
      if (IN6_IS_ADDR_LINKLOCAL(&address->sin6_addr)) continue;
      inet_ntop(AF_INET6, &address->sin6_addr, text, sizeof(text));
    } else {
      continue;
    }
    (each->ifa_flags & IFF_LOOPBACK ? loopback : addresses).push_back(text);
  }
  freeifaddrs(first);
  addresses.insert(addresses.end(), loopback.begin(), loopback.end());
  return addresses;
}

/// False: the deadline has passed.
bool wait_for(int socket, short events, Deadline deadline) {
  for (;;) {
    pollfd entry{socket, events, 0};
    if (poll(&entry, 1, 5) > 0) return true;
    if (deadline.passed(now_ns()) || (deadline.stop && (*deadline.stop)())) return false;
  }
}

bool send_whole(int socket, const void* data, size_t bytes) {
  return send(socket, data, bytes, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
}

bool receive_whole(int socket, void* data, size_t bytes, Deadline deadline) {
  char* to = static_cast<char*>(data);
  while (bytes > 0) {
    if (!wait_for(socket, POLLIN, deadline)) return false;
    const ssize_t received = recv(socket, to, bytes, 0);
    if (received == 0 || (received < 0 && errno != EAGAIN && errno != EINTR)) return false;
    if (received > 0) {
      to += received;
      bytes -= static_cast<size_t>(received);
    }
  }
  return true;
}

/// Not in constant time: a token serves once, and its guesser has no second try.
bool same_token(const char* token, const std::string& expected) {
  return std::memcmp(token, expected.data(), sizeof(Hello::token)) == 0;
}

void keep_alive(int socket) {
  const int on = 1;
  const unsigned int patience_ms = give_up_ms;
  setsockopt(socket, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPIDLE, &keepalive_s, sizeof(keepalive_s));
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPINTVL, &keepalive_s, sizeof(keepalive_s));
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPCNT, &unanswered, sizeof(unanswered));
  setsockopt(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience_ms, sizeof(patience_ms));
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

/// -1 if nobody answers there.
int connect_once(const std::string& address, int port, Deadline deadline) {
  sockaddr_storage to{};
  socklen_t length = sizeof(sockaddr_in);
  auto* v4 = reinterpret_cast<sockaddr_in*>(&to);
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&to);
  if (inet_pton(AF_INET, address.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(static_cast<uint16_t>(port));
  } else if (inet_pton(AF_INET6, address.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(static_cast<uint16_t>(port));
    length = sizeof(sockaddr_in6);
  } else {
    return -1;
  }
  const int fd = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -1;
  int error = 0;
  socklen_t error_length = sizeof(error);
  const bool pending = connect(fd, reinterpret_cast<sockaddr*>(&to), length) != 0;
  if (pending && (errno != EINPROGRESS || !wait_for(fd, POLLOUT, deadline) ||
                  getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &error_length) != 0 || error != 0)) {
    close(fd);
    return -1;
  }
  return fd;
}

Deadline sooner(Deadline deadline, int64_t within_ns) {
  deadline.at_ns = std::min(deadline.at_ns, now_ns() + within_ns);
  return deadline;
}

}  // namespace

TcpListener::~TcpListener() {
  if (socket_ >= 0) close(socket_);
}

void TcpListener::open(int backlog) {
  guest_token_ = random_token();
  host_token_ = random_token();
  sockaddr_in6 any{};
  any.sin6_family = AF_INET6;
  const int off = 0;
  socket_ = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (socket_ >= 0) setsockopt(socket_, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
  if (socket_ < 0 || bind(socket_, reinterpret_cast<sockaddr*>(&any), sizeof(any)) != 0) {
    // A host without IPv6.
    if (socket_ >= 0) close(socket_);
    sockaddr_in any4{};
    any4.sin_family = AF_INET;
    socket_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (socket_ < 0 || bind(socket_, reinterpret_cast<sockaddr*>(&any4), sizeof(any4)) != 0) {
      fail("cannot open a TCP socket for the control connection between hosts");
    }
  }
  sockaddr_storage bound{};
  socklen_t length = sizeof(bound);
  if (listen(socket_, backlog + 8) != 0 ||
      getsockname(socket_, reinterpret_cast<sockaddr*>(&bound), &length) != 0) {
    fail("cannot listen for the control connection between hosts");
  }
  // sin_port and sin6_port lie at the same place.
  port_ = ntohs(reinterpret_cast<const sockaddr_in*>(&bound)->sin_port);
}

std::string TcpListener::invitation() const {
  if (socket_ < 0) return "";
  std::string text = std::to_string(port_) + " " + guest_token_ + " " + host_token_;
  for (const std::string& address : own_addresses()) text += " " + address;
  return text;
}

std::pair<int, int> TcpListener::accept(Deadline deadline) {
  for (;;) {
    if (!wait_for(socket_, POLLIN, deadline)) {
      throw Error(ErrorCode::timeout,
                  "another host did not open its control connection in time: is TCP between the "
                  "hosts blocked by a firewall?");
    }
    const int fd = accept4(socket_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      // Out of files, say: the guest stays in the queue, so another look would find it at once.
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        fail("cannot accept the control connection of another host");
      }
      continue;
    }
    Hello hello;
    if (receive_whole(fd, &hello, sizeof(hello), sooner(deadline, one_address_ns)) &&
        same_token(hello.token, guest_token_) &&
        send_whole(fd, host_token_.data(), sizeof(Hello::token))) {
      keep_alive(fd);
      return {fd, hello.number};
    }
    close(fd);
  }
}

int tcp_connect(const std::string& invitation, int number, Deadline deadline) {
  std::istringstream words(invitation);
  int port = 0;
  std::string guest_token, host_token, tried;
  words >> port >> guest_token >> host_token;
  Hello hello{};
  std::memcpy(hello.token, guest_token.data(), std::min(guest_token.size(), sizeof(hello.token)));
  hello.number = number;
  for (std::string address; words >> address;) {
    tried += " " + address;
    const int fd = connect_once(address, port, sooner(deadline, one_address_ns));
    if (fd < 0) continue;
    char token[sizeof(Hello::token)];
    if (send_whole(fd, &hello, sizeof(hello)) &&
        receive_whole(fd, token, sizeof(token), sooner(deadline, handshake_ns)) &&
        host_token.size() == sizeof(token) && same_token(token, host_token)) {
      keep_alive(fd);
      return fd;
    }
    close(fd);
  }
  throw Error(ErrorCode::resource, "no control connection to another host: port " +
                                       std::to_string(port) + " does not answer at" +
                                       (tried.empty() ? " any address" : tried) +
                                       "; is TCP between the hosts blocked by a firewall?");
}

}  // namespace ringreduce
