// What each algorithm costs, as the textbook has it. The tuner's estimates, the simulator and the tests use
// these formulas; the simulator holds them true, message by message.
//
// p ranks, n elements, in chunks of c. A message of m bytes takes alpha + m * beta (Hockney, "The
// communication challenge for MPP", 1994). Rounds R = ceil(n / (p c)); chunks of half a message
// C = ceil(n / (2 c)); height of the trees H = ceil(log2 p). With equal blocks:
//
//                         steps              elements moved by the busiest rank
//   one_shot              1                  (p - 1) n          fetched
//   two_shot              2                  2 (p - 1) n / p    half fetched, half stored
//   ring_reduce_scatter   (p - 1) R          (p - 1) n / p      sent
//   ring_allgather        (p - 1) R          (p - 1) n / p      sent
//   ring_allreduce        2 (p - 1) R        2 (p - 1) n / p    sent
//   chain                 p - 2 + ceil(n/c)  n                  sent
//   tree_allreduce        2 H + C - 1        2 n                sent (p = 2: n;  p = 3: 3 n / 2)
//
// A step is a message that cannot be sent before another one has come; over a window, a meeting of all
// ranks. For p = 1 and for n = 0 everything is zero, but for the meetings of an empty message.
#pragma once

#include "algorithms/topology.h"
#include "base/chunk.h"
#include "base/dtype.h"

namespace ringreduce {

/// A link, or a rank's access to the memory of others.
struct Link {
  double alpha_s;           // latency of a message or a meeting
  double beta_s_per_byte;  // inverse bandwidth
};

/// A number of elements on the move. Partial sums of 16-bit floats travel as float32.
struct Elements {
  size_t partial = 0;  // of unfinished sums
  size_t storage = 0;  // of tensors: inputs and results

  constexpr size_t bytes(Dtype dtype) const {
    return partial * partial_size_of(dtype) + storage * size_of(dtype);
  }
};

struct Cost {
  size_t steps = 0;
  Elements serial;  // along the longest chain of steps: what must be moved one after the other
  Elements moved;   // by one rank: sent; over a window, fetched from or stored to the other ranks

  constexpr double time_s(Link link, Dtype dtype) const {
    return static_cast<double>(steps) * link.alpha_s +
           static_cast<double>(serial.bytes(dtype)) * link.beta_s_per_byte;
  }
};

namespace cost {

/// ceil(count / piece)
constexpr size_t pieces(size_t count, size_t piece) { return (count + piece - 1) / piece; }

}  // namespace cost

// ---- Over a window. Every rank owns one block of the message; what is claimed instead of owned comes to
// the same sum over all ranks.

/// One meeting; then every rank reads the inputs of all the others.
constexpr Cost one_shot_cost(size_t count, int size) {
  if (size == 1) return {};
  const Elements inputs{.storage = static_cast<size_t>(size - 1) * count};
  return {.steps = 1, .serial = inputs, .moved = inputs};
}

/// A meeting before and one after; between them, a rank reads its block of all other inputs and stores it
/// to all other outputs.
constexpr Cost two_shot_cost(const Blocks& blocks, int rank) {
  if (blocks.size() == 1) return {};
  const size_t others = static_cast<size_t>(blocks.size() - 1);
  return {.steps = 2,
          .serial = {.storage = 2 * others * blocks.largest()},
          .moved = {.storage = 2 * others * blocks[rank].length}};
}

// ---- On the ring. Exact for equal blocks; for others an upper bound of `steps` and `serial`, since a rank
// does not wait for a chunk that is empty. `moved` is always exact.

/// In each of p - 1 steps of a round, a rank sends one chunk: of every block but its own.
constexpr Cost ring_reduce_scatter_cost(const Blocks& blocks, size_t chunk, int rank) {
  const size_t hops = static_cast<size_t>(blocks.size() - 1);
  if (hops == 0) return {};
  return {.steps = hops * blocks.rounds(chunk),
          .serial = {.partial = hops * blocks.largest()},
          .moved = {.partial = blocks.count() - blocks[rank].length}};
}

/// The same, of every block but the next rank's, which that rank has.
constexpr Cost ring_allgather_cost(const Blocks& blocks, size_t chunk, int rank) {
  const size_t hops = static_cast<size_t>(blocks.size() - 1);
  if (hops == 0) return {};
  const int next = Ring{rank, blocks.size()}.next().rank;
  return {.steps = hops * blocks.rounds(chunk),
          .serial = {.storage = hops * blocks.largest()},
          .moved = {.storage = blocks.count() - blocks[next].length}};
}

constexpr Cost ring_allreduce_cost(const Blocks& blocks, size_t chunk, int rank) {
  const Cost up = ring_reduce_scatter_cost(blocks, chunk, rank);
  const Cost down = ring_allgather_cost(blocks, chunk, rank);
  return {.steps = up.steps + down.steps,
          .serial = {.partial = up.serial.partial, .storage = down.serial.storage},
          .moved = {.partial = up.moved.partial, .storage = down.moved.storage}};
}
