// A flag in shared memory: a number that one side publishes and others wait for. Also the two futex
// calls, the only way that a rank ever sleeps.
//
// The word holds value * 2 + "somebody sleeps". Why no wake-up is lost: a waiter sets the sleeper
// bit by compare-and-swap on the very word it will sleep on, so the kernel refuses the sleep if a
// publish came between; a publisher replaces the whole word by one exchange and wakes if the bit
// was set. Both are read-modify-writes of one word, hence totally ordered: no further fence is
// needed. What the publisher wrote before (release) is seen by whoever reads the value (acquire).
//
// 64 bits, so that values never wrap, and a flag that lay idle for billions of collectives is not
// taken for one that is ahead. A futex is 32: the kernel looks at the lower half, which would have
// to come round to the same value, 2^31 publishes later, between a waiter's look and its sleep.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <climits>
#include <cstdint>
#include <ctime>

namespace ringreduce {

static_assert(std::endian::native == std::endian::little);  // the lower half is at the address

/// Sleeps while the lower half of `word` is that of `expected`, at most `timeout_ns`. Works between
/// processes: not a private futex.
inline void futex_wait(const std::atomic<uint64_t>& word, uint64_t expected, int64_t timeout_ns) {
  const timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT, static_cast<uint32_t>(expected), &timeout, nullptr, 0);
}

inline void futex_wake(const std::atomic<uint64_t>& word, int sleepers) {
  syscall(SYS_futex, &word, FUTEX_WAKE, sleepers, nullptr, nullptr, 0);
}

/// Values only grow.
class Flag {
 public:
  /// Called by the flag's one writer, or by one at a time.
  void publish(uint64_t value) {
    const uint64_t before = word_.exchange(value << 1, std::memory_order_acq_rel);
    if (before & 1) futex_wake(word_, INT_MAX);
  }

  bool reached(uint64_t value) const { return this->value() >= value; }

  /// The last value published; 0: none yet.
  uint64_t value() const { return word_.load(std::memory_order_acquire) >> 1; }

  /// Sleeps until a publish, but at most `slice_ns`; returns at once if `value` is reached.
  void sleep(uint64_t value, int64_t slice_ns) {
    uint64_t word = word_.load(std::memory_order_acquire);
    if (word >> 1 >= value) return;
    if (!(word & 1)) {
      if (!word_.compare_exchange_strong(word, word | 1, std::memory_order_acq_rel)) return;
      word |= 1;
    }
    futex_wait(word_, word, slice_ns);
  }

 private:
  std::atomic<uint64_t> word_{0};
};

}  // namespace ringreduce
