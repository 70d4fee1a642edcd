// The double binary tree: sums travel up to the root, results down again, half of the message on
// each of two trees (topology.h names the paper). Latency grows with log2 p, and a rank sends no
// more than about twice the message, as on the ring: the choice for many ranks and middling
// messages.
//
// Depth of a rank: d; height of the trees: H; chunks per half: C. The schedule is skewed: at step s
// a rank moves chunk s - (H - d) up and chunk s - (H + d) down, so that every message is received
// exactly one step after it was sent, and all chunks are under way at once: 2 H + C - 1 messages
// one after the other. Three chunks in a tree of height two:
//
//     step       0     1     2     3             4             5             6
//     depth 2    up 0  up 1  up 2                down 0        down 1        down 2
//     depth 1          up 0  up 1  up 2, down 0  down 1        down 2
//     the root               up 0  up 1          up 2            (its sums go down at once)
//
// Without the skew, up and down chunk by chunk, 64 ranks with 64 chunks take 1089 steps in place of
// 75. Two slots per FIFO are enough: by induction over the steps, the slot a message needs was
// emptied the step before. The Wire is the ring's (ring.h).
#pragma once

#include "algorithms/topology.h"
#include "base/chunk.h"

namespace ringreduce {

/// One rank's part in one of the two trees.
struct TreePart {
  Peers up_from, up_to;      // the children's sums come from; the sum goes to the parent
  Peers down_from, down_to;  // results come from the parent; go to the children
  long depth, height;
  Chunk half;  // of the message

  RR_HOST_DEVICE static TreePart of(int tree, int rank, int size, size_t count) {
    const DoubleTree trees{size};
    const TreePlace place = trees.place(tree, rank);
    TreePart part;
    for (int child = 0; child < place.num_children; ++child) {
      part.up_from.add({place.children[child], up_channel + tree});
      part.down_to.add({place.children[child], down_channel + tree});
    }
    if (place.parent != -1) {
      part.up_to.add({place.parent, up_channel + tree});
      part.down_from.add({place.parent, down_channel + tree});
    }
    part.depth = place.depth;
    part.height = trees.height();
    const size_t first = (count + 1) / 2;
    part.half = tree == 0 ? Chunk{0, first} : Chunk{first, count - first};
    return part;
  }

  RR_HOST_DEVICE bool is_root() const { return up_to.count == 0; }
};

/// The reduce: the children's partial sums and mine go to the parent. The root finishes the sum,
/// keeps it, and starts it on its way down.
template <class Wire>
RR_HOST_DEVICE void tree_up(Wire& wire, const TreePart& part, Chunk chunk) {
  if (part.is_root()) {
    wire.recv_reduce_copy_send(part.up_from, part.down_to, chunk);
  } else {
    wire.recv_reduce_send(part.up_from, part.up_to, chunk);
  }
}

/// The broadcast: results come from the parent, are kept, and go to the children.
template <class Wire>
RR_HOST_DEVICE void tree_down(Wire& wire, const TreePart& part, Chunk chunk) {
  if (!part.is_root()) wire.recv_copy_send(part.down_from, part.down_to, chunk);
}

/// Both on both trees, in one skewed schedule.
template <class Wire>
RR_HOST_DEVICE void tree_allreduce(Wire& wire, int rank, int size, size_t count, size_t chunk) {
  const TreePart parts[2] = {TreePart::of(0, rank, size, count),
                             TreePart::of(1, rank, size, count)};
  const long height = parts[0].height;
  const long chunks = static_cast<long>((parts[0].half.length + chunk - 1) / chunk);
  for (long step = 0; step < chunks + 2 * height; ++step) {
    for (const TreePart& part : parts) {
      const long up = step - (height - part.depth);
      const long down = step - (height + part.depth);
      if (0 <= up && up < chunks) tree_up(wire, part, part.half.piece(up, chunk));
      if (0 <= down && down < chunks) tree_down(wire, part, part.half.piece(down, chunk));
    }
  }
}

}  // namespace ringreduce
