// The one function through which every wait goes. A wait looks at its flag only, for a short while;
// then also at its Watch (aborts, dead peers, deadlines, signals); then it gives up the core; then
// it sleeps.
#pragma once

#include <cstdint>

#include "base/watch.h"
#include "shm/flag.h"

namespace ringreduce {

/// How long each phase of a wait lasts.
struct Patience {
  int spins;   // looks at the flag, with a pause between
  int yields;  // sched_yield calls
  // A sleep ends after this long to look at the watch again; so an abort is noticed within it.
  static constexpr int64_t sleep_slice_ns = 2'000'000;

  // Measured with 2 ranks on 2 cores and 8 ranks on 2 cores (AMD Zen 4): where ranks have a core
  // each, a spin of tens of microseconds beats the futex's round trip; where they share cores,
  // every spin is taken from the rank that is waited for (8 bytes took 27 us with 100 spins, 20 us
  // with 10, 19 us with none), and a few yields let it run without the cost of sleeping (5 to 1000
  // of them: the same within the noise).
  static constexpr Patience own_core() { return {20'000, 20}; }
  static constexpr Patience shared_core() { return {10, 20}; }
  /// Where a network is waited for, too, a long spin saves nothing.
  static constexpr Patience beside_network() { return {100, 20}; }
};

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

/// False if the watch stopped the wait before `value` was reached.
bool wait_slowly(Flag& flag, uint64_t value, Patience patience, Watch& watch);

inline bool wait(Flag& flag, uint64_t value, Patience patience, Watch& watch) {
  return flag.reached(value) || wait_slowly(flag, value, patience, watch);
}

}  // namespace ringreduce
