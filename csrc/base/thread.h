// Threads of this library's own.
#pragma once

#include <signal.h>

#include <thread>
#include <utility>

namespace ringreduce {

/// Runs `function` on a new thread, which nobody waits for. No signal handler ever runs there:
/// signals are for the user's threads.
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
  std::thread(std::move(function)).detach();
}

}  // namespace ringreduce
