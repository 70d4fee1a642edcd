// Points in time on the monotonic clock, in nanoseconds.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>

namespace ringreduce {

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// A moment after which waiting ends, and what else may end a wait on a socket.
struct Deadline {
  int64_t at_ns = std::numeric_limits<int64_t>::max();
  const std::function<bool()>* stop = nullptr;  // asked every few ms by waits on sockets

  static Deadline never() { return {}; }
  static Deadline after_s(double seconds) {
    if (seconds >= 1e9) return never();
    return {now_ns() + static_cast<int64_t>(seconds * 1e9), nullptr};
  }
  bool passed(int64_t now) const { return now >= at_ns; }
};

}  // namespace ringreduce
