#include "shm/socket.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "base/error.h"

namespace ringreduce {
namespace {

constexpr uint64_t largest_message_bytes = uint64_t{64} << 20;

[[noreturn]] void fail(const std::string& what) {
  throw Error(ErrorCode::resource, what + ": " + std::strerror(errno));
}

/// The abstract address of `name`: a zero byte, then the name without an end mark.
socklen_t address_of(const std::string& name, sockaddr_un* address) {
  std::memset(address, 0, sizeof(*address));
  address->sun_family = AF_UNIX;
  const std::string full = "ringreduce-" + name;
  std::memcpy(address->sun_path + 1, full.data(), full.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + full.size());
}

[[noreturn]] void lost_peer() {
  throw Error(ErrorCode::peer_failed, "a rank of this node ended while shared memory was set up");
}

void wait_for(int socket, short events, Deadline deadline) {
  for (;;) {
    pollfd entry{socket, events, 0};
    if (poll(&entry, 1, 5) > 0) return;
    if (deadline.stop && (*deadline.stop)()) lost_peer();
    if (deadline.passed(now_ns())) {
      throw Error(ErrorCode::timeout,
                  "timed out while the ranks of a node set up shared memory: a rank did not come");
    }
  }
}

bool same_user(int socket) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && peer.uid == geteuid();
}

int new_socket() {
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) fail("cannot create a unix socket");
  return fd;
}

}  // namespace

std::string random_name() {
  unsigned char bytes[16];
  if (getrandom(bytes, sizeof(bytes), 0) != sizeof(bytes)) fail("no random numbers");
  std::string name;
  for (unsigned char byte : bytes) {
    name += "0123456789abcdef"[byte >> 4];
    name += "0123456789abcdef"[byte & 15];
  }
  return name;
}

int listen_on(const std::string& name, int backlog) {
  const int fd = new_socket();
  sockaddr_un address;
  const socklen_t length = address_of(name, &address);
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), length) != 0 || listen(fd, backlog) != 0) {
    close(fd);
    fail("cannot listen on a unix socket");
  }
  return fd;
}

int accept_from(int listener, Deadline deadline) {
  for (;;) {
    wait_for(listener, POLLIN, deadline);
    const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0 && same_user(fd)) return fd;
    if (fd >= 0) close(fd);
    // Out of files, say: the peer stays in the queue, so another look would find it at once.
    if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)) {
      fail("cannot accept the connection of another rank of this node");
    }
  }
}

int connect_to(const std::string& name, Deadline deadline) {
  sockaddr_un address;
  const socklen_t length = address_of(name, &address);
  const int fd = new_socket();
  while (connect(fd, reinterpret_cast<sockaddr*>(&address), length) != 0) {
    // A full backlog says EAGAIN: the leader is busy accepting the others.
    if (errno != EAGAIN || deadline.passed(now_ns())) {
      close(fd);
      fail("cannot connect to the first rank of this node");
    }
    poll(nullptr, 0, 1);
  }
  if (!same_user(fd)) {
    close(fd);
    throw Error(ErrorCode::resource,
                "the socket of this node's first rank belongs to another user");
  }
  return fd;
}

void send_all(int socket, const void* data, size_t size_bytes, Deadline deadline) {
  const char* from = static_cast<const char*>(data);
  while (size_bytes > 0) {
    const ssize_t sent = send(socket, from, size_bytes, MSG_NOSIGNAL);
    if (sent > 0) {
      from += sent;
      size_bytes -= static_cast<size_t>(sent);
    } else if (errno == EAGAIN) {
      wait_for(socket, POLLOUT, deadline);
    } else if (errno != EINTR) {
      lost_peer();
    }
  }
}

void receive_all(int socket, void* data, size_t size_bytes, Deadline deadline) {
  char* to = static_cast<char*>(data);
  while (size_bytes > 0) {
    const ssize_t received = recv(socket, to, size_bytes, 0);
    if (received > 0) {
      to += received;
      size_bytes -= static_cast<size_t>(received);
    } else if (received < 0 && errno == EAGAIN) {
      wait_for(socket, POLLIN, deadline);
    } else if (received == 0 || errno != EINTR) {
      lost_peer();
    }
  }
}

void send_message(int socket, const std::string& message, Deadline deadline) {
  const uint64_t length = message.size();
  send_all(socket, &length, sizeof(length), deadline);
  send_all(socket, message.data(), message.size(), deadline);
}

std::string receive_message(int socket, Deadline deadline) {
  uint64_t length = 0;
  receive_all(socket, &length, sizeof(length), deadline);
  if (length > largest_message_bytes) {
    throw Error(ErrorCode::resource,
                "a peer announced a message of " + std::to_string(length) + " bytes");
  }
  std::string message(length, '\0');
  receive_all(socket, message.data(), message.size(), deadline);
  return message;
}

void send_fd(int socket, int fd, Deadline deadline) {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
  }
  while (sendmsg(socket, &message, MSG_NOSIGNAL) != 1) {
    if (errno == EAGAIN) {
      wait_for(socket, POLLOUT, deadline);
    } else if (errno != EINTR) {
      lost_peer();
    }
  }
}

int receive_fd(int socket, Deadline deadline) {
  for (;;) {
    char byte = 0;
    iovec data{&byte, 1};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    if (received == 1) {
      const cmsghdr* header = CMSG_FIRSTHDR(&message);
      int fd = -1;
      if (header == nullptr || header->cmsg_type != SCM_RIGHTS) return fd;
      std::memcpy(&fd, CMSG_DATA(header), sizeof(int));
      return fd;
    }
    if (received < 0 && errno == EAGAIN) {
      wait_for(socket, POLLIN, deadline);
    } else if (received == 0 || errno != EINTR) {
      lost_peer();
    }
  }
}

}  // namespace ringreduce
