// The ring: reduce_scatter and allgather, p - 1 steps each, and allreduce = both (Patarasuk, Yuan:
// "Bandwidth optimal all-reduce algorithms", 2009). Every rank talks to its two neighbours only and
// sends 2 (p - 1) / p of the message, the least that any allreduce can.
//
// The message is cut into p blocks, block r ending at rank r; blocks are cut into chunks, and each
// round moves one chunk of every block. cost.h has the steps and the elements sent. Two ranks at
// least: a ring of one would add its own data twice.
//
// A Wire moves one chunk per call, and blocks until its slots are free or full:
//   send(to, chunk)                          my contribution
//   send_result(to, chunk)                   my finished data
//   recv_reduce_send(from, to, chunk)        the peers' partial sums + mine, passed on
//   recv_reduce_copy_send(from, to, chunk)   the same, finished: kept, and passed on
//   recv_copy_send(from, to, chunk)          finished data, kept, and passed on
// Peers may be none ({}), one or two. Empty chunks move nothing. After an abort every call is a
// no-op.
#pragma once

#include "algorithms/topology.h"
#include "base/chunk.h"

namespace ringreduce {

/// One rank's view of the message on the ring: chunk `round` of the block that ends `back` ranks
/// behind it.
struct RingChunks {
  const Ring& ring;
  const Blocks& blocks;
  size_t chunk;

  RR_HOST_DEVICE Chunk operator()(int back, size_t round) const {
    const int owner = (ring.rank - back + ring.size) % ring.size;
    return blocks[owner].piece(round, chunk);
  }
};

/// Block r of the sum ends in rank r's output. If all of it is the root's block: a reduce along a
/// chain.
template <class Wire>
RR_HOST_DEVICE void ring_reduce_scatter(Wire& wire, const Ring& ring, const Blocks& blocks,
                                        size_t chunk) {
  const RingChunks part{ring, blocks, chunk};
  for (size_t round = 0; round < blocks.rounds(chunk); ++round) {
    wire.send(ring.next(), part(1, round));
    for (int back = 2; back < ring.size; ++back) {
      wire.recv_reduce_send(ring.previous(), ring.next(), part(back, round));
    }
    wire.recv_reduce_copy_send(ring.previous(), {}, part(0, round));
  }
}

/// Block r of rank r's output goes to all. If all of it is the root's block: a broadcast along a
/// chain.
template <class Wire>
RR_HOST_DEVICE void ring_allgather(Wire& wire, const Ring& ring, const Blocks& blocks,
                                   size_t chunk) {
  const RingChunks part{ring, blocks, chunk};
  for (size_t round = 0; round < blocks.rounds(chunk); ++round) {
    wire.send_result(ring.next(), part(0, round));
    for (int back = 1; back < ring.size - 1; ++back) {
      wire.recv_copy_send(ring.previous(), ring.next(), part(back, round));
    }
    wire.recv_copy_send(ring.previous(), {}, part(ring.size - 1, round));
  }
}

/// Both, joined where they meet: the rank that finishes a chunk of the sum sends it on in the same
/// step.
template <class Wire>
RR_HOST_DEVICE void ring_allreduce(Wire& wire, const Ring& ring, const Blocks& blocks,
                                   size_t chunk) {
  const RingChunks part{ring, blocks, chunk};
  for (size_t round = 0; round < blocks.rounds(chunk); ++round) {
    wire.send(ring.next(), part(1, round));
    for (int back = 2; back < ring.size; ++back) {
      wire.recv_reduce_send(ring.previous(), ring.next(), part(back, round));
    }
    wire.recv_reduce_copy_send(ring.previous(), ring.next(), part(0, round));
    for (int back = 1; back < ring.size - 1; ++back) {
      wire.recv_copy_send(ring.previous(), ring.next(), part(back, round));
    }
    wire.recv_copy_send(ring.previous(), {}, part(ring.size - 1, round));
  }
}

}  // namespace ringreduce
