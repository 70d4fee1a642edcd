#include "shm/wait.h"

#include <sched.h>

namespace ringreduce {

bool wait_slowly(Flag& flag, uint64_t value, Patience patience, Watch& watch) {
  for (int spin = 0; spin < patience.spins; ++spin) {
    cpu_pause();
    if (flag.reached(value)) return true;
    // A spinning rank may hold its core for a while: a peer's death should not wait for the sleep.
    if (spin % 1024 == 1023 && watch.stop()) return flag.reached(value);
  }
  for (int yield = 0; yield < patience.yields; ++yield) {
    sched_yield();
    if (flag.reached(value)) return true;
  }
  while (!watch.stop()) {
    flag.sleep(value, Patience::sleep_slice_ns);
    if (flag.reached(value)) return true;
  }
  return flag.reached(value);
}

}  // namespace ringreduce
