// Hierarchical: reduce-scatter inside each node, allreduce of each shard across the nodes,
// allgather inside. Every rank that carries a shard drives the network at once, and a node sends no
// more than 2 (n - 1) / n of the message, n being the nodes, however many ranks it holds (Cho,
// Finkler, Kung, Hunter: "BlueConnect: decomposing all-reduce for deep learning on heterogeneous
// network hierarchy", 2019).
//
// The message is cut into segments. While the shards of one travel, the next one is reduced inside
// and an earlier one is gathered: across and inside overlap, so the time is that of the slower of
// the two, and once the other for a single segment. cost.h has steps, bytes and time. Three
// segments, where the network is the slower:
//
//     inside   reduce 0 | reduce 1 |       gather 0 | reduce 2 | gather 1 |       gather 2
//     across            | 0 ------------ | 1 -------------------- | 2 ----------- |
//
// Phases are what a rank does with a segment:
//   reduce_scatter(segment)  with the node's ranks: its sum of this rank's shard, unfinished
//   start(segment)           hands that shard to its allreduce across the nodes, which runs
//                            elsewhere: on a thread of its own, one segment after the other
//   finish(segment)          waits until that has ended
//   allgather(segment)       with the node's ranks: all shards of the finished segment
// A rank without a shard takes part inside only; its start and finish are empty.
#pragma once

#include "base/chunk.h"

namespace ringreduce {

/// Who carries what. Rail l joins the ranks of local rank l on all nodes; there are as many rails
/// as the smallest node has ranks, so that every shard has one carrier on every node.
struct Rails {
  int rails;
  size_t count;        // elements of the message
  size_t segment;      // elements per segment
  size_t granule = 1;  // shards are rounded up to this, as in Blocks

  RR_HOST_DEVICE constexpr size_t segments() const { return (count + segment - 1) / segment; }
  RR_HOST_DEVICE constexpr Chunk whole(size_t index) const {
    return Chunk{0, count}.piece(index, segment);
  }
  /// Who owns what of a segment inside a node of `local_size` ranks; offsets count from the
  /// segment's first element.
  constexpr Blocks shards(size_t index, int local_size) const {
    return Blocks::first(rails, whole(index).length, local_size, granule);
  }
  /// The shard of rail `rail` in elements of the message.
  constexpr Chunk shard(size_t index, int rail) const {
    const Chunk part = shards(index, rails)[rail];
    return {whole(index).offset + part.offset, part.length};
  }
};

/// `lead`: how many segments are under way across the nodes while the next one is reduced inside;
/// at least one for an overlap. No rank waits for a segment that another one starts later.
template <class Phases>
void hierarchical_allreduce(Phases& phases, size_t segments, size_t lead) {
  for (size_t step = 0; step < segments + lead; ++step) {
    if (step < segments) {
      phases.reduce_scatter(step);
      phases.start(step);
    }
    if (step >= lead) {
      phases.finish(step - lead);
      phases.allgather(step - lead);
    }
  }
}

}  // namespace ringreduce
