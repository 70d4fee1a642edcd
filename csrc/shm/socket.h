// Unix sockets between the ranks of a node: connecting, and moving bytes and file descriptors under
// a deadline. Abstract names: no file to leave behind; the name is random and the peer's user is
// checked.
#pragma once

#include <cstddef>
#include <string>

#include "base/deadline.h"

namespace ringreduce {

/// A random name that nobody can guess, as hexadecimal digits.
std::string random_name();

int listen_on(const std::string& name, int backlog);
/// The next connection of a process of the same user; others are turned away.
int accept_from(int listener, Deadline deadline);
int connect_to(const std::string& name, Deadline deadline);

void send_all(int socket, const void* data, size_t size_bytes, Deadline deadline);
void receive_all(int socket, void* data, size_t size_bytes, Deadline deadline);

/// Length-prefixed; lengths above 64 MB are refused.
void send_message(int socket, const std::string& message, Deadline deadline);
std::string receive_message(int socket, Deadline deadline);

/// -1 stands for a file descriptor that the sender lacks, or for which the receiver has none free.
void send_fd(int socket, int fd, Deadline deadline);
int receive_fd(int socket, Deadline deadline);

}  // namespace ringreduce
