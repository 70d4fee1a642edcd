// Who talks to whom: the ring, and the two binary trees over which a message travels in halves.
// Closed forms: every rank computes its own neighbours, and anybody else's, without asking.
#pragma once

#include "base/device.h"

namespace ringreduce {

/// Each channel is a FIFO of its own between two ranks, so messages of different trees or
/// directions never queue behind each other, and no order depends on timing.
enum Channel : int {
  ring_channel = 0,
  up_channel = 1,    // of tree t: up_channel + t
  down_channel = 3,  // of tree t: down_channel + t
  doubling_channel = 5
};
inline constexpr int num_channels = 6;

/// One end of a FIFO as an algorithm names it: the rank at the other end, and the channel.
struct Peer {
  int rank;
  int channel;
};

/// The ranks that one step receives from or sends to: none, one, or two.
struct Peers {
  Peer peer[2] = {};
  int count = 0;

  constexpr Peers() = default;
  RR_HOST_DEVICE constexpr Peers(Peer only) : peer{only, {}}, count(1) {}
  RR_HOST_DEVICE constexpr void add(Peer next) { peer[count++] = next; }
  RR_HOST_DEVICE constexpr const Peer* begin() const { return peer; }
  RR_HOST_DEVICE constexpr const Peer* end() const { return peer + count; }
};

/// Steps in which one rank can reach `size` of them. 0 for one.
RR_HOST_DEVICE constexpr int ceil_log2(int size) {
  int log2 = 0;
  while ((size - 1) >> log2 > 0) ++log2;
  return log2;
}

struct Ring {
  int rank, size;

  RR_HOST_DEVICE constexpr Peer next() const { return {(rank + 1) % size, ring_channel}; }
  RR_HOST_DEVICE constexpr Peer previous() const {
    return {(rank + size - 1) % size, ring_channel};
  }
};

/// A rank's place in one tree. depth = edges to the root.
struct TreePlace {
  int parent = -1;  // -1: this is the root
  int children[2] = {-1, -1};
  int num_children = 0;
  int depth = 0;
};

/// The in-order binary tree over positions 0 .. size-1: position 0 is the root and has one child;
/// below it, a position's level is the number of its trailing zero bits, so all odd positions are
/// leaves. Of eight positions, from left to right, each below its parent:
///
///     0
///                 4
///           2           6
///        1     3     5     7
struct InorderTree {
  int size;

  RR_HOST_DEVICE constexpr int parent(int position) const {
    if (position == 0) return -1;
    const int bit = position & -position;
    const int wanted = (position & ~bit) | (bit << 1);
    // Past the end: the left neighbour on that level.
    return wanted < size ? wanted : position & ~bit;
  }

  /// The child to the right must exist within `size`: levels are skipped until one does.
  RR_HOST_DEVICE constexpr TreePlace place(int position) const {
    TreePlace place;
    place.parent = parent(position);
    for (int up = place.parent; up != -1; up = parent(up)) ++place.depth;
    int bit = position & -position;
    if (position == 0) {
      for (bit = 1; bit < size; bit <<= 1) {
      }
    } else if (bit > 1) {
      place.children[place.num_children++] = position - bit / 2;
    }
    for (bit >>= 1; bit > 0; bit >>= 1) {
      if (position + bit < size) {
        place.children[place.num_children++] = position + bit;
        break;
      }
    }
    return place;
  }

  /// The largest depth of any position.
  RR_HOST_DEVICE constexpr int height() const { return ceil_log2(size); }
};

/// Two trees over the same ranks, each carrying half of the message (Sanders, Speck, Traeff:
/// "Two-tree algorithms for full bandwidth broadcast, reduction and scan", 2009). A leaf only
/// sends; so the second tree makes the leaves of the first its inner nodes: mirrored for even
/// sizes, shifted by one for odd ones, where exactly one rank is inner in both.
struct DoubleTree {
  int size;

  RR_HOST_DEVICE constexpr TreePlace place(int tree, int rank) const {
    TreePlace place = InorderTree{size}.place(position(tree, rank));
    if (place.parent != -1) place.parent = rank_at(tree, place.parent);
    for (int child = 0; child < place.num_children; ++child) {
      place.children[child] = rank_at(tree, place.children[child]);
    }
    return place;
  }

  RR_HOST_DEVICE constexpr int height() const { return InorderTree{size}.height(); }

 private:
  RR_HOST_DEVICE constexpr int position(int tree, int rank) const {
    if (tree == 0) return rank;
    return size % 2 == 0 ? size - 1 - rank : (rank + size - 1) % size;
  }
  RR_HOST_DEVICE constexpr int rank_at(int tree, int position) const {
    if (tree == 0) return position;
    return size % 2 == 0 ? size - 1 - position : (position + 1) % size;
  }
};

}  // namespace ringreduce
