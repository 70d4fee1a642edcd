// One collective on a simulated machine: from the inputs of all ranks to their outputs, with counts
// and times. This is what tests and programs call.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/cost.h"
#include "base/chunk.h"
#include "reduce/reduce.h"
#include "sim/machine.h"

namespace ringreduce::sim {

enum class Algorithm : int {
  ring_allreduce,
  ring_reduce_scatter,
  ring_allgather,
  tree_allreduce,
  doubling_allreduce,
  one_shot,
  two_shot,
  staged_allreduce,
  staged_reduce_scatter,
  staged_allgather,
};

inline constexpr const char* algorithm_names[] = {
    "ring_allreduce",   "ring_reduce_scatter", "ring_allgather",
    "tree_allreduce",   "doubling_allreduce",  "one_shot",
    "two_shot",         "staged_allreduce",    "staged_reduce_scatter",
    "staged_allgather",
};

/// What is to be done. Every rank has a whole message in `inputs` and one in `outputs`, rank after
/// rank; of these, reduce_scatter writes and allgather reads the rank's own block only.
struct Problem {
  Reduction reduction;
  Blocks blocks;  // of reduction.size ranks
  size_t chunk;   // elements per message, slice, or block and round
  const char* inputs;
  char* outputs;     // may be `inputs`
  size_t lead = 1;   // of staged rounds
  size_t lanes = 1;  // of a ring
};

struct Outcome {
  std::string failure;        // empty if there was none
  std::vector<Counts> ranks;  // in order
  double finish_s = 0;        // of the last rank
};

/// A world of one runs no algorithm: its output is its input. Throws std::invalid_argument for a
/// problem or a machine that make no sense; what goes wrong while ranks run is in the outcome.
Outcome simulate(Algorithm algorithm, const Problem& problem, const Machine& machine);

/// What cost.h says of it, for one rank. Nothing for staged rounds: they move what two_shot does,
/// but how much of the waiting is hidden depends on the lead.
std::optional<Cost> cost_of(Algorithm algorithm, const Problem& problem, int rank);

}  // namespace ringreduce::sim
