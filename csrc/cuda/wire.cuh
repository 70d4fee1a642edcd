// The Wire of kernels: FIFOs of slots in the receivers' slabs, on which ring.h and tree.h run. Each
// block has its own, and carries its own stripe of the message. The sender reduces straight into
// the receiver's slot. Partial sums of 16-bit floats travel as float32.
//
// `filled` is written by the sender alone, `emptied` by the receiver alone; both count the chunks
// of this call, so all slots are free when it begins: all ranks have arrived, hence have left the
// call before, and there they have received all that was sent. A slot is written when it has been
// emptied, and read when it has been filled: between `wait` and `advance`, which publishes as
// team.cuh has it.
#pragma once

#include "algorithms/topology.h"
#include "base/chunk.h"
#include "cuda/mixed.cuh"
#include "cuda/slab.h"
#include "cuda/team.cuh"

namespace ringreduce::cuda {

/// Elements in a slot, also as partial sums.
template <class Stored>
inline constexpr size_t slot_elements = fifo_slot_bytes / sizeof(PartialOf<Stored>);

template <class Stored>
class Wire {
 public:
  /// `stripe`: what of the message this block carries; chunks count from its start.
  __device__ Wire(Team& team, const DeviceCall& call, Chunk stripe, bool trees)
      : team_(team),
        call_(call),
        input_(call.input + stripe.offset * sizeof(Stored)),
        output_(call.output + stripe.offset * sizeof(Stored)),
        slots_(trees ? tree_slots : ring_slots) {
    if (trees) connect_trees();
  }

  __device__ void send(Peers to, Chunk chunk) { move({}, to, chunk, Becomes::partial); }
  __device__ void recv_reduce_send(Peers from, Peers to, Chunk chunk) {
    move(from, to, chunk, Becomes::partial);
  }
  __device__ void recv_reduce_copy_send(Peers from, Peers to, Chunk chunk) {
    move(from, to, chunk, Becomes::result);
  }
  __device__ void recv_copy_send(Peers from, Peers to, Chunk chunk) {
    move(from, to, chunk, Becomes::copy);
  }

 private:
  enum class Becomes { partial, result, copy };

  /// One step. Out of line: algorithms name it often, and a call costs nothing beside a chunk.
  __device__ __noinline__ void move(Peers from, Peers to, Chunk chunk, Becomes becomes) {
    if (chunk.empty() || !wait(from, to)) return;
    Mixed mixed;
    for (const Peer& peer : from) mixed.partials[mixed.num_partials++] = incoming_slot(peer);
    mixed.own = input_ + chunk.offset * sizeof(Stored);
    if (becomes != Becomes::partial) {
      mixed.targets[mixed.num_targets++] = output_ + chunk.offset * sizeof(Stored);
    }
    for (const Peer& peer : to) mixed.targets[mixed.num_targets++] = outgoing_slot(peer);
    if (becomes == Becomes::partial) {
      reduce_mixed<Stored, false>(call_.op, 1, mixed, chunk.length);
    } else if (becomes == Becomes::result) {
      reduce_mixed<Stored, true>(call_.op, call_.op == Op::avg ? call_.size : 1, mixed,
                                 chunk.length);
    } else {
      copy_to_all<Stored>(mixed.partials[0], mixed, chunk.length);
    }
    advance(from, to);
  }

  /// A FIFO in each direction of every edge. Each end numbers its edges itself: the ring's is 0; in
  /// a tree a rank's first child, second child and parent.
  __device__ void connect_trees() {
    const DoubleTree trees{call_.size};
    for (int tree = 0; tree < 2; ++tree) {
      const TreePlace place = trees.place(tree, call_.rank);
      const int first = 3 * tree;
      for (int child = 0; child < 2; ++child) {
        neighbours_[first + child] = place.children[child];
        ports_there_[first + child] = first + 2;
      }
      neighbours_[first + 2] = place.parent;
      if (place.parent == -1) continue;
      const bool is_first = trees.place(tree, place.parent).children[0] == call_.rank;
      ports_there_[first + 2] = first + (is_first ? 0 : 1);
    }
  }
  __device__ int my_port(Peer peer) const {
    if (peer.channel == ring_channel) return 0;
    const int first = (peer.channel - up_channel) % 2 * 3;
    for (int port = first; port < first + 2; ++port) {
      if (neighbours_[port] == peer.rank) return port;
    }
    return first + 2;
  }
  __device__ int peers_port(Peer peer) const { return ports_there_[my_port(peer)]; }

  __device__ char* slot(int rank, int port, uint32_t moved) const {
    const auto index = static_cast<int>(moved % static_cast<uint32_t>(slots_));
    return team_.slab(rank).fifo_slot(team_.block(), port * slots_ + index, call_.size);
  }
  __device__ const char* incoming_slot(Peer peer) const {
    return slot(call_.rank, my_port(peer), received_[my_port(peer)]);
  }
  __device__ char* outgoing_slot(Peer peer) const {
    return slot(peer.rank, peers_port(peer), sent_[my_port(peer)]);
  }

  /// visit(peer, whether data comes from there), one peer to a thread.
  template <class Visit>
  __device__ static void for_each_edge(const Peers& from, const Peers& to, Visit visit) {
    for (int i = static_cast<int>(threadIdx.x); i < from.count + to.count; i += blockDim.x) {
      const bool comes = i < from.count;
      visit(comes ? from.peer[i] : to.peer[i - from.count], comes);
    }
  }

  /// Until every peer in `from` has filled its next slot and every peer in `to` has emptied one.
  __device__ bool wait(const Peers& from, const Peers& to) {
    if (team_.stopped()) return false;
    const SlabHead& head = team_.slab(call_.rank).head();
    const auto slots = static_cast<uint32_t>(slots_);
    bool good = true;
    for_each_edge(from, to, [&](Peer peer, bool comes) {
      const int at = my_port(peer);
      if (comes) {
        good &= team_.wait_for(head.filled[team_.block()][at], received_[at] + 1, peer.rank);
      } else if (sent_[at] >= slots) {
        const uint32_t count = sent_[at] - slots + 1;
        good &= team_.wait_for(head.emptied[team_.block()][at], count, peer.rank);
      }
    });
    return team_.agree(good);
  }

  __device__ void advance(const Peers& from, const Peers& to) {
    for (const Peer& peer : from) ++received_[my_port(peer)];
    for (const Peer& peer : to) ++sent_[my_port(peer)];
    __syncthreads();
    for_each_edge(from, to, [&](Peer peer, bool comes) {
      SlabHead& head = team_.slab(peer.rank).head();
      const int at = my_port(peer), there = peers_port(peer);
      if (comes) {
        store_release(&head.emptied[team_.block()][there], team_.word(received_[at]));
      } else {
        store_release(&head.filled[team_.block()][there], team_.word(sent_[at]));
      }
    });
  }

  Team& team_;
  const DeviceCall& call_;
  const char* const input_;
  char* const output_;
  const int slots_;
  // By port.
  int neighbours_[tree_fifos] = {}, ports_there_[tree_fifos] = {};
  uint32_t received_[tree_fifos] = {}, sent_[tree_fifos] = {};  // chunks
};

}  // namespace ringreduce::cuda
