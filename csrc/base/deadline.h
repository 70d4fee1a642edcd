// Points in time on the monotonic clock, in nanoseconds.
#pragma once

#include <chrono>
#include <cstdint>
#include <limits>

namespace ringreduce {

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// A moment after which waiting ends.
struct Deadline {
  int64_t at_ns = std::numeric_limits<int64_t>::max();

  static Deadline never() { return {}; }
  static Deadline after_s(double seconds) {
    if (seconds >= 1e9) return never();
    return {now_ns() + static_cast<int64_t>(seconds * 1e9)};
  }
  bool passed(int64_t now) const { return now >= at_ns; }
};

}  // namespace ringreduce
