// One shot: every rank reads all inputs and computes all of the result itself. One meeting and no
// second one: the inputs lie in two places by turns, and nobody comes back to the first before all
// have met once more. For small messages, where a meeting costs more than p times the arithmetic.
#pragma once

#include "base/chunk.h"

namespace ringreduce {

/// Adds in rank order 0 .. p-1: bitwise the same everywhere. False: nothing was reduced (see the
/// window).
template <class Window>
RR_HOST_DEVICE bool one_shot_allreduce(Window& window, size_t count) {
  window.share_input(Chunk{0, count});
  if (!window.arrive()) return false;
  window.reduce_to_self(Chunk{0, count});
  return true;
}

}  // namespace ringreduce
