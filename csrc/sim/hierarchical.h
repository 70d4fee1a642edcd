// Hierarchical on a simulated cluster: hierarchical.h unchanged, with any number of virtual ranks
// per node. A rank is two fibers: one for what it does inside its node, one for its shard's
// allreduces across the nodes, over a simulated Wire. Inside, ranks meet and read each other's
// memory, as over a window (machine.h).
#pragma once

#include <string>
#include <vector>

#include "algorithms/cost.h"
#include "algorithms/hierarchical.h"
#include "reduce/reduce.h"
#include "sim/machine.h"

namespace ringreduce::sim {

struct Cluster {
  std::vector<int> local_sizes;  // ranks of each node; they are numbered node by node
  Link inside{1, 0};
  Machine machine;           // its link is the one across
  bool shared_port = false;  // the ranks of a node send through one port, else each through its own
};

/// Messages of all ranks one after the other, of rails.count elements each; reduction.size ranks.
struct ClusterProblem {
  Reduction reduction;
  Rails rails;
  size_t lead;  // segments
  Across across;
  size_t chunk;  // of it, in elements
  size_t lanes;  // of a ring
  const char* inputs;
  char* outputs;  // may be `inputs`
};

struct ClusterOutcome {
  std::string failure;                 // empty if there was none
  std::vector<Counts> inside, across;  // by rank
  double finish_s = 0;                 // of the last rank
};

/// Throws std::invalid_argument for what makes no sense.
ClusterOutcome simulate(const ClusterProblem& problem, const Cluster& cluster);

}  // namespace ringreduce::sim
