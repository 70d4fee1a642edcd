// TCP between the leaders of two nodes: an invitation that one gives out by way of the bootstrap,
// and a connection that the other opens with it. Both sides show a random token from the
// invitation, so nobody else can be one of them; the kernel's keepalive ends a connection whose
// peer is gone.
#pragma once

#include <string>
#include <utility>

#include "base/deadline.h"

namespace ringreduce {

class TcpListener {
 public:
  TcpListener() = default;
  ~TcpListener();
  TcpListener(const TcpListener&) = delete;
  TcpListener& operator=(const TcpListener&) = delete;

  void open(int backlog);
  /// "port token token address address ..."; empty if it is not open.
  std::string invitation() const;
  /// The next connection of somebody who was invited: socket, and the number that it gave.
  std::pair<int, int> accept(Deadline deadline);

 private:
  int socket_ = -1, port_ = 0;
  std::string guest_token_, host_token_;
};

/// Tries the invitation's addresses in turn. `number`: what the listener is told.
int tcp_connect(const std::string& invitation, int number, Deadline deadline);

}  // namespace ringreduce
