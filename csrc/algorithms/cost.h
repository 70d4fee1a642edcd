// What each algorithm costs, as the textbook has it. The simulator holds these formulas true,
// message by message; what a link really costs is not known here.
//
// p ranks, n elements, in chunks of c elements. Rounds R = ceil(n / (p c)), chunks of half a
// message C = ceil(n / (2 c)), height of the trees H = ceil(log2 p). For p > 1, n > 0 and equal
// blocks:
//
//                          steps                 elements moved by the busiest rank
//   one_shot               1                     (p - 1) n        fetched
//   two_shot               2                     2 (p - 1) n / p  half of them fetched, half stored
//   ring_reduce_scatter    (p - 1) R             (p - 1) n / p    sent
//   ring_allgather         (p - 1) R             (p - 1) n / p    sent
//   ring_allreduce         2 (p - 1) R           2 (p - 1) n / p  sent
//   chain_reduce           p - 2 + ceil(n / c)   n                sent
//   chain_broadcast        p - 2 + ceil(n / c)   n                sent
//   tree_allreduce         2 H + C - 1           2 n              sent (p = 3: 3 n / 2, p = 2: n)
//   doubling_allreduce     H ceil(n / c)         H n              sent (p no power of 2: see below)
//
// Hierarchical, for each of m segments of n / m elements, on nodes of q ranks each: inside, 1 step
// and (q - 1) n / q elements fetched before and after; across, an allreduce of n / q elements by
// the nodes. Overlapped: T(inside) + T(across) + (m - 1) max(T(inside), T(across)), T being the
// time of a segment.
//
// A step is a message that cannot leave before another one has come, or a meeting of all ranks. A
// message of m bytes takes alpha + m * beta (Hockney: "The communication challenge for MPP", 1994).
#pragma once

#include <cstddef>

#include "algorithms/doubling.h"
#include "algorithms/hierarchical.h"
#include "algorithms/topology.h"
#include "base/chunk.h"
#include "base/dtype.h"

namespace ringreduce {

/// A link to another rank, or the access to its memory.
struct Link {
  double alpha_s;          // latency of a message, or of a meeting
  double beta_s_per_byte;  // inverse bandwidth
};

/// A number of elements on the move. Unfinished sums of 16-bit floats travel as float32.
struct Elements {
  size_t partial = 0;  // of unfinished sums
  size_t storage = 0;  // of tensors: inputs and results

  constexpr size_t bytes(Dtype dtype) const {
    return partial * partial_size_of(dtype) + storage * size_of(dtype);
  }
};

struct Cost {
  size_t steps = 0;
  Elements serial;  // what has to be moved one after the other, on the longest chain; of all ranks
  Elements moved;   // by this rank: sent, or else fetched from and stored to the memory of others

  constexpr double time_s(Link link, Dtype dtype) const {
    return static_cast<double>(steps) * link.alpha_s +
           static_cast<double>(serial.bytes(dtype)) * link.beta_s_per_byte;
  }
};

// ---- Over a window.

/// One meeting; then every rank reads the inputs of all others.
constexpr Cost one_shot_cost(size_t count, int size) {
  if (size == 1) return {};
  const Elements inputs{.storage = static_cast<size_t>(size - 1) * count};
  return {.steps = 1, .serial = inputs, .moved = inputs};
}

/// A meeting before and one after. Between them every rank reads its block of all other inputs, and
/// stores the result to all other outputs. Where slices are claimed, this is true of the average
/// rank.
constexpr Cost two_shot_cost(const Blocks& blocks, int rank) {
  const size_t others = static_cast<size_t>(blocks.size() - 1);
  if (others == 0) return {};
  return {.steps = 2,
          .serial = {.storage = 2 * others * blocks.largest()},
          .moved = {.storage = 2 * others * blocks[rank].length}};
}

// ---- On the ring. `moved` is exact. `steps` and `serial` are so for equal blocks, and otherwise
// bounds from above: a rank does not wait for chunks that are empty.

/// In every round a rank sends one chunk of each block but its own.
constexpr Cost ring_reduce_scatter_cost(const Blocks& blocks, size_t chunk, int rank) {
  const size_t others = static_cast<size_t>(blocks.size() - 1);
  if (others == 0) return {};
  return {.steps = others * blocks.rounds(chunk),
          .serial = {.partial = others * blocks.largest()},
          .moved = {.partial = blocks.count() - blocks[rank].length}};
}

/// In every round a rank sends one chunk of each block but the next rank's.
constexpr Cost ring_allgather_cost(const Blocks& blocks, size_t chunk, int rank) {
  const size_t others = static_cast<size_t>(blocks.size() - 1);
  if (others == 0) return {};
  const int next = Ring{rank, blocks.size()}.next().rank;
  return {.steps = others * blocks.rounds(chunk),
          .serial = {.storage = others * blocks.largest()},
          .moved = {.storage = blocks.count() - blocks[next].length}};
}

constexpr Cost ring_allreduce_cost(const Blocks& blocks, size_t chunk, int rank) {
  const Cost reduce_scatter = ring_reduce_scatter_cost(blocks, chunk, rank);
  const Cost allgather = ring_allgather_cost(blocks, chunk, rank);
  return {.steps = reduce_scatter.steps + allgather.steps,
          .serial = {reduce_scatter.serial.partial, allgather.serial.storage},
          .moved = {reduce_scatter.moved.partial, allgather.moved.storage}};
}

// ---- Along a chain: the ring where all of the message is the root's block. A rank has one step
// per round, so chunks follow each other at a distance of one. Exact.

/// Elements of the longest chain: a first chunk over p - 1 links, all others over the last of them.
constexpr size_t chain_serial(size_t count, int size, size_t chunk) {
  const size_t first = count < chunk ? count : chunk;
  return static_cast<size_t>(size - 2) * first + count;
}

constexpr size_t chain_steps(size_t count, int size, size_t chunk) {
  return count == 0 ? 0 : static_cast<size_t>(size - 2) + (count + chunk - 1) / chunk;
}

/// Every rank but the root sends what has come, and its own.
constexpr Cost chain_reduce_cost(size_t count, int size, size_t chunk, int root, int rank) {
  if (size == 1) return {};
  return {.steps = chain_steps(count, size, chunk),
          .serial = {.partial = chain_serial(count, size, chunk)},
          .moved = {.partial = rank == root ? 0 : count}};
}

/// Every rank but the one before the root sends what has come.
constexpr Cost chain_broadcast_cost(size_t count, int size, size_t chunk, int root, int rank) {
  if (size == 1) return {};
  return {.steps = chain_steps(count, size, chunk),
          .serial = {.storage = chain_serial(count, size, chunk)},
          .moved = {.storage = Ring{rank, size}.next().rank == root ? 0 : count}};
}

// ---- On the two trees.

/// `steps` and `moved` are exact. `serial` is a bound from above: the first chunk climbs H links
/// and comes down over H, being the second that its parent sends on all but the root's; of all
/// further chunks, no rank sends more than two sums and two results.
constexpr Cost tree_allreduce_cost(size_t count, int size, size_t chunk, int rank) {
  if (size == 1 || count == 0) return {};
  const DoubleTree trees{size};
  const size_t height = static_cast<size_t>(trees.height());
  const size_t halves[2] = {(count + 1) / 2, count / 2};
  const size_t first = halves[0] < chunk ? halves[0] : chunk;
  const size_t further = (size == 2 ? 1 : 2) * (halves[0] - first);
  Cost cost{.steps = 2 * height + (halves[0] + chunk - 1) / chunk - 1,
            .serial = {height * first + further, (2 * height - 1) * first + further},
            .moved = {}};
  for (int tree = 0; tree < 2; ++tree) {
    const TreePlace place = trees.place(tree, rank);
    if (place.parent != -1) cost.moved.partial += halves[tree];
    cost.moved.storage += halves[tree] * static_cast<size_t>(place.num_children);
  }
  return cost;
}

// ---- By recursive doubling. Exact; but `serial` is a bound from above where there are extra
// ranks, as the chain with most steps need not be the one with most elements. An extra rank's data
// are one step late; that delays all results by a step. They come back another step late only to
// extra ranks whose partners are farthest from another extra rank's partner: where more than half
// of the paired ranks are partners.

constexpr Cost doubling_allreduce_cost(size_t count, int size, size_t chunk, int rank) {
  if (size == 1 || count == 0) return {};
  const Doubling pairs{rank, size};
  const int extra = size - pairs.paired();
  const size_t exchanges = static_cast<size_t>(pairs.exchanges());
  const size_t there = extra > 0 ? 1 : 0, back = 2 * extra > pairs.paired() ? 1 : 0;
  Cost cost{.steps = (count + chunk - 1) / chunk * (exchanges + there + back),
            .serial = {(exchanges + there) * count, there * count},
            .moved = {exchanges * count, pairs.partner().count > 0 ? count : 0}};
  if (pairs.is_extra()) cost.moved = {count, 0};
  return cost;
}

// ---- Across nodes and inside.

/// The algorithms that a shard can take across the nodes.
enum class Across : int { ring, tree, doubling };
inline constexpr const char* across_names[] = {"ring", "tree", "doubling"};

constexpr const char* name_of(Across algorithm) {
  return across_names[static_cast<int>(algorithm)];
}

constexpr Cost across_cost(Across algorithm, size_t count, int nodes, size_t chunk, int node) {
  switch (algorithm) {
    case Across::ring:
      return ring_allreduce_cost(Blocks::even(count, nodes), chunk, node);
    case Across::tree:
      return tree_allreduce_cost(count, nodes, chunk, node);
    default:
      return doubling_allreduce_cost(count, nodes, chunk, node);
  }
}

struct HierarchicalCost {
  size_t segments = 0;
  Cost reduce_scatter, across, allgather;  // of the first segment; none is longer
  Elements inside_moved, across_moved;     // of all segments, by this rank: fetched, and sent

  /// `across_s`: the time of the first segment's allreduce. Exact for equal segments where inside
  /// is not the slower, otherwise a bound from above.
  constexpr double time_s(Link inside, double across_s, Dtype dtype) const {
    if (segments == 0) return 0;
    const double inside_s = reduce_scatter.time_s(inside, dtype) + allgather.time_s(inside, dtype);
    const double slower_s = inside_s > across_s ? inside_s : across_s;
    return inside_s + across_s + static_cast<double>(segments - 1) * slower_s;
  }
};

/// Of local rank `local` on node `node`, which holds `local_size` ranks. A rank fetches its shard
/// from the others, and later their shards.
constexpr HierarchicalCost hierarchical_cost(const Rails& rails, int local_size, int nodes,
                                             int node, int local, Across algorithm, size_t chunk) {
  HierarchicalCost cost;
  cost.segments = rails.segments();
  if (cost.segments == 0) return cost;
  const size_t others = static_cast<size_t>(local_size - 1), meeting = others > 0 ? 1 : 0;
  for (const size_t segment : {size_t{0}, cost.segments - 1}) {  // all but the last are alike
    const size_t times = segment > 0 || cost.segments == 1 ? 1 : cost.segments - 1;
    const Blocks shards = rails.shards(segment, local_size);
    const size_t own = shards[local].length, whole = shards.count();
    if (segment == 0) {
      const size_t largest = shards.largest(), least = shards[local_size - 1].length;
      cost.reduce_scatter = {meeting, {.storage = others * largest}, {.storage = others * own}};
      cost.allgather = {meeting, {.storage = whole - least}, {.storage = whole - own}};
      cost.across = across_cost(algorithm, largest, nodes, chunk, node);
    }
    const Cost across = across_cost(algorithm, own, nodes, chunk, node);
    cost.inside_moved.storage += times * (others * own + (whole - own));
    cost.across_moved.partial += times * across.moved.partial;
    cost.across_moved.storage += times * across.moved.storage;
    if (cost.segments == 1) break;
  }
  return cost;
}

}  // namespace ringreduce
