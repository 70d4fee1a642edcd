// A flag in shared memory: a number that one side publishes and others wait for. Also the two futex
// calls, the only way that a rank ever sleeps.
//
// The word holds value * 2 + "somebody sleeps". Why no wake-up is lost: a waiter sets the sleeper
// bit by compare-and-swap on the very word it will sleep on, so the kernel refuses the sleep if a
// publish came between; a publisher replaces the whole word by one exchange and wakes if the bit
// was set. Both are read-modify-writes of one word, hence totally ordered: no further fence is
// needed. What the publisher wrote before (release) is seen by whoever reads the value (acquire).
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <ctime>

namespace ringreduce {

/// Sleeps while `word` is `expected`, at most `timeout_ns`. Works between processes: not a private
/// futex.
inline void futex_wait(const std::atomic<uint32_t>& word, uint32_t expected, int64_t timeout_ns) {
  const timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

inline void futex_wake(const std::atomic<uint32_t>& word, int sleepers) {
  syscall(SYS_futex, &word, FUTEX_WAKE, sleepers, nullptr, nullptr, 0);
}

/// Values grow and wrap at 31 bits; they are compared cyclically, so waiters may lag by up to 2^30.
class Flag {
 public:
  static uint32_t wrapped(uint64_t value) { return static_cast<uint32_t>(value) & 0x7fffffffu; }

  /// Whether a wrapped value is `value` or past it.
  static bool reaches(uint32_t wrapped_value, uint64_t value) {
    return ((wrapped_value - wrapped(value)) & 0x7fffffffu) < 0x40000000u;
  }

  /// Called by the flag's one writer, or by one at a time.
  void publish(uint64_t value) {
    const uint32_t before = word_.exchange(wrapped(value) << 1, std::memory_order_acq_rel);
    if (before & 1) futex_wake(word_, INT_MAX);
  }

  bool reached(uint64_t value) const {
    return reached_in(word_.load(std::memory_order_acquire), value);
  }

  /// The last value published, modulo 2^31.
  uint32_t value() const { return word_.load(std::memory_order_acquire) >> 1; }

  /// Sleeps until a publish, but at most `slice_ns`; returns at once if `value` is reached.
  void sleep(uint64_t value, int64_t slice_ns) {
    uint32_t word = word_.load(std::memory_order_acquire);
    if (reached_in(word, value)) return;
    if (!(word & 1)) {
      if (!word_.compare_exchange_strong(word, word | 1, std::memory_order_acq_rel)) return;
      word |= 1;
    }
    futex_wait(word_, word, slice_ns);
  }

 private:
  static bool reached_in(uint32_t word, uint64_t value) { return reaches(word >> 1, value); }

  std::atomic<uint32_t> word_{0};
};

}  // namespace ringreduce
