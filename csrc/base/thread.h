// Threads of this library's own.
#pragma once

#include <signal.h>

#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "base/error.h"

namespace ringreduce {

/// Runs `function` on a new thread, which nobody waits for. No signal handler ever runs there:
/// signals are for the user's threads. Throws ErrorCode::resource.
template <class Function>
void start_thread(Function function) {
  struct Blocked {  // a new thread inherits the mask
    sigset_t before;
    Blocked() {
      sigset_t all;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    ~Blocked() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
  } blocked;
  try {
    std::thread(std::move(function)).detach();
  } catch (const std::system_error& error) {
    throw Error(ErrorCode::resource, std::string("cannot start a thread: ") + error.what() +
                                         ". Raise the limits of threads (ulimit -u) and memory of "
                                         "this user, container or job");
  }
}

}  // namespace ringreduce
