// Two shot: each slice of the message is reduced by one rank only, from all p inputs in rank order
// 0 .. p-1, and the result reaches all p outputs. The bits are the same on all ranks, in every run,
// whoever reduced.
//
// A Window is memory of every rank that all can reach. If the tensors themselves lie there
// (symmetric), a slice is read from p inputs and stored to p outputs: every input is read once and
// every output written once, the least that is possible. When all have come and agree:
//   next_slice(slice)     a slice of the message that falls to me; false when there is none
//   reduce_to_all(slice)  from all inputs to all outputs
//   done()                returns when every output is complete
//
// Tensors anywhere else are staged: copied through the window in rounds. The three phases of a
// round are skewed against each other, so that ranks rarely wait:
//   prepare(round)  put my contribution into the window
//   combine(round)  reduce what of the round falls to me
//   collect(round)  fetch what is finished
// Three rounds, each phase one ahead of the next:
//     step       0  1  2  3  4
//     prepare    0  1  2
//     combine       0  1  2
//     collect          0  1  2
#pragma once

#include "base/chunk.h"

namespace ringreduce {

/// Symmetric tensors, in place or not: two meetings for the whole message.
template <class Window>
RR_HOST_DEVICE void two_shot_allreduce(Window& window) {
  for (Chunk slice; window.next_slice(slice);) window.reduce_to_all(slice);
  window.done();
}

/// Staged rounds. `lead`: by how many rounds each phase runs ahead of the next one; the window has
/// room for 3 * lead + 2 rounds at least. Reduce_scatter is this without collect, allgather without
/// combine.
template <class Phases>
RR_HOST_DEVICE void staged_rounds(Phases& phases, size_t rounds, size_t lead) {
  for (size_t step = 0; step < rounds + 2 * lead; ++step) {
    if (step < rounds) phases.prepare(step);
    if (lead <= step && step - lead < rounds) phases.combine(step - lead);
    if (2 * lead <= step) phases.collect(step - 2 * lead);
  }
}

}  // namespace ringreduce
