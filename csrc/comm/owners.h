// Collectives across nodes in which every part of the message has one owner: reduce_scatter and
// reduce bring each part's sum to its owner, allgather and broadcast bring it from there to all.
// Rings over the nodes, one for each rail, so a node sends no more than others need of it: of S
// bytes all but its own ranks' parts when they are summed up, and all but the next node's when they
// are gathered (Chan, Heimlich, Purkayastha, van de Geijn: "Collective communication: theory,
// practice, and experience", 2007).
#pragma once

#include "comm/steps.h"

namespace ringreduce {

/// Who owns what, in elements of the message, and which rail carries it. Rails carry the parts of
/// their own ranks, where all nodes have equally many and `rails_own`; else each carries an equal
/// share of a node's parts, which the ranks of the node exchange among themselves.
struct Owners {
  std::vector<Chunk> parts;  // by rank
  bool rails_own = false;
};

/// Part r of the sum ends in rank r's outputs.
void reduce_to_owners(Steps& steps, const Message& message, const Owners& owners);

/// Part r of rank r's inputs goes to all outputs.
void gather_from_owners(Steps& steps, const Message& message, const Owners& owners);

}  // namespace ringreduce
