// Which algorithm goes across the nodes, in which chunks, and into how many segments a message is
// cut for it: pure functions of the message, the nodes and the constants of the links, by cost.h.
// All ranks that agree on these choose alike. Knows nothing of what links really do.
#pragma once

#include <cstddef>

#include "algorithms/cost.h"
#include "algorithms/hierarchical.h"

namespace ringreduce {

struct AcrossChoice {
  Across algorithm = Across::doubling;
  size_t chunk = 1;  // elements
};

/// What a tree takes, which cost.h bounds only: once its chunks are all under way, one follows
/// another after the four messages that a rank sends meanwhile (three ranks: three, two: two), or
/// after one message and a half, whichever is longer. Within 8 % of the simulator.
constexpr double tree_time_s(size_t count, int size, size_t chunk, Link link, Dtype dtype) {
  if (size == 1 || count == 0) return 0;
  const size_t half = (count + 1) / 2, first = half < chunk ? half : chunk;
  const double hops = ceil_log2(size);
  const double chunk_s = static_cast<double>(first * partial_size_of(dtype)) * link.beta_s_per_byte;
  const double chunks = static_cast<double>(half) / static_cast<double>(first);
  const double sends = size < 4 ? size : 4;
  const double one_s = link.alpha_s + 1.5 * chunk_s, busy_s = sends * chunk_s;
  return 2 * hops * link.alpha_s + (3 * hops - 1) * chunk_s +
         (chunks - 1) * (one_s > busy_s ? one_s : busy_s);
}

/// `lanes`: of a ring. Where all of them are busy, they hide most of each other's latency.
constexpr double across_time_s(AcrossChoice choice, size_t count, int nodes, Link link, Dtype dtype,
                               size_t lanes = 1) {
  if (choice.algorithm == Across::tree) {
    return tree_time_s(count, nodes, choice.chunk, link, dtype);
  }
  if (choice.algorithm == Across::ring &&
      Blocks::even(count, nodes).rounds(choice.chunk) >= lanes) {
    link.alpha_s /= static_cast<double>(lanes);
  }
  return across_cost(choice.algorithm, count, nodes, choice.chunk, 0).time_s(link, dtype);
}

/// The best for `count` elements per rank, in chunks of `most_chunk` elements at most.
constexpr AcrossChoice choose_across(size_t count, int nodes, Link link, Dtype dtype,
                                     size_t most_chunk, size_t lanes = 1) {
  const size_t share = (count + static_cast<size_t>(nodes) - 1) / static_cast<size_t>(nodes);
  const auto within = [&](size_t elements) {
    const size_t most = elements < most_chunk ? elements : most_chunk;
    return most > 0 ? most : 1;
  };
  AcrossChoice best{Across::doubling, within(count)};
  double best_s = across_time_s(best, count, nodes, link, dtype, lanes);
  const auto consider = [&](AcrossChoice candidate) {
    const double time_s = across_time_s(candidate, count, nodes, link, dtype, lanes);
    if (time_s < best_s) {
      best_s = time_s;
      best = candidate;
    }
  };
  for (size_t chunk = within((count + 1) / 2);; chunk = (chunk + 1) / 2) {
    consider({Across::tree, chunk});
    if (chunk == 1) break;
  }
  consider({Across::ring, within(share)});
  return best;
}

/// The nodes of a communicator.
struct NodesShape {
  int nodes;
  int local_size;  // ranks of the largest
  int rails;       // ranks of the smallest
};

/// How a message crosses nodes.
struct NodesChoice {
  size_t segment = 1;  // elements
  AcrossChoice across;
  double time_s = 0;
};

constexpr double hierarchical_time_s(const Rails& rails, int local_size, int nodes,
                                     AcrossChoice across, Link inside, Link link, Dtype dtype,
                                     size_t lanes = 1) {
  const HierarchicalCost cost =
      hierarchical_cost(rails, local_size, nodes, 0, 0, across.algorithm, across.chunk);
  const size_t shard = rails.shards(0, local_size).largest();
  return cost.time_s(inside, across_time_s(across, shard, nodes, link, dtype, lanes), dtype);
}

/// Segments hide the phases inside behind the network, but each pays the network's latency.
constexpr NodesChoice choose_hierarchical(size_t count, NodesShape shape, Link inside, Link link,
                                          Dtype dtype, size_t most_chunk, size_t lanes = 1) {
  NodesChoice best;
  const auto ranks = static_cast<size_t>(shape.local_size);
  for (size_t segments = 1; segments <= 64 && (segments == 1 || segments * ranks <= count);
       segments *= 2) {
    const Rails rails{shape.rails, count, (count + segments - 1) / segments + (count == 0)};
    const size_t shard = rails.shards(0, shape.local_size).largest();
    const AcrossChoice across = choose_across(shard, shape.nodes, link, dtype, most_chunk, lanes);
    const double time_s = hierarchical_time_s(rails, shape.local_size, shape.nodes, across, inside,
                                              link, dtype, lanes);
    if (segments == 1 || time_s < best.time_s) best = {rails.segment, across, time_s};
  }
  return best;
}

}  // namespace ringreduce
