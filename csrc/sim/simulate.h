// One collective on a simulated machine, from the inputs of all ranks to their outputs, with counts
// and times. This is what tests and programs call.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "base/chunk.h"
#include "reduce/reduce.h"
#include "sim/machine.h"

namespace ringreduce::sim {

enum class Algorithm : int {
  ring_allreduce,
  ring_reduce_scatter,
  ring_allgather,
  tree_allreduce,
  one_shot,
  two_shot,
  staged_allreduce,
  staged_reduce_scatter,
  staged_allgather,
};

inline constexpr const char* algorithm_names[] = {
    "ring_allreduce",   "ring_reduce_scatter",
    "ring_allgather",   "tree_allreduce",
    "one_shot",         "two_shot",
    "staged_allreduce", "staged_reduce_scatter",
    "staged_allgather",
};

/// What is to be done. Every rank has a whole message in `inputs` and one in `outputs`, rank after
/// rank; of these, reduce_scatter writes and allgather reads the rank's own block only.
struct Problem {
  Reduction reduction;
  Blocks blocks;  // of reduction.size ranks
  size_t chunk;   // elements per message, slice, or block and round
  const char* inputs;
  char* outputs;    // may be `inputs`
  size_t lead = 1;  // of staged rounds
};

struct Outcome {
  std::string failure;        // empty if there was none
  std::vector<Counts> ranks;  // in order
  double finish_s = 0;        // of the last rank
};

/// A world of one runs no algorithm: its output is its input.
Outcome simulate(Algorithm algorithm, const Problem& problem, const Machine& machine);

}  // namespace ringreduce::sim
