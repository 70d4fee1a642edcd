// The ring: reduce_scatter and allgather, p - 1 steps each, and allreduce = both (Patarasuk, Yuan:
// "Bandwidth optimal all-reduce algorithms", 2009). Every rank talks to its two neighbours only and
// sends 2 (p - 1) / p of the message, the least that any allreduce can.
//
// The message is cut into p blocks, block r ending at rank r; blocks are cut into chunks, and each
// round moves one chunk of every block. Which block each of four ranks sends in each step:
//
//               sums      results
//     step     0  1  2    3  4  5
//     rank 0   3  2  1    0  3  2    What a rank receives in one step it sends in the next: block 3
//     rank 1   0  3  2    1  0  3    goes from rank 0 on, every rank adding its own input, and is
//     rank 2   1  0  3    2  1  0    complete at rank 3; from there the result goes round again.
//     rank 3   2  1  0    3  2  1
//
// cost.h has the steps and the elements sent. Two ranks at least: a ring of one would add its own
// data twice.
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

/// `lanes` rounds are under way at once, so that the links carry one chunk while another one is
/// being added; round r is on lane r mod lanes, and a rank serves its lanes by turns: start(round)
/// sends the first message of a round, and receive(round, index) takes number `index` of
/// `receives`. lanes + 1 slots per FIFO are enough, and the least: numbering a rank's messages in
/// order, number m needs a slot that the next rank has emptied before its own number m - 1, and
/// data that the previous rank has sent as number m - lanes, so no wait is for a later number.
template <class Start, class Receive>
RR_HOST_DEVICE void ring_rounds(size_t rounds, size_t receives, size_t lanes, Start start,
                                Receive receive) {
  const size_t turns = (rounds + lanes - 1) / lanes;
  for (size_t step = 0; step <= turns * receives; ++step) {
    for (size_t lane = 0; lane < lanes; ++lane) {
      if (step > 0) receive((step - 1) / receives * lanes + lane, (step - 1) % receives);
      // A round past the end has empty chunks, which move nothing.
      if (step % receives == 0) start(step / receives * lanes + lane);
    }
  }
}

/// Block r of the sum ends in rank r's output. If all of it is the root's block: a reduce along a
/// chain.
template <class Wire>
RR_HOST_DEVICE void ring_reduce_scatter(Wire& wire, const Ring& ring, const Blocks& blocks,
                                        size_t chunk, size_t lanes = 1) {
  const RingChunks part{ring, blocks, chunk};
  const auto start = [&](size_t round) { wire.send(ring.next(), part(1, round)); };
  const auto receive = [&](size_t round, size_t index) {
    const int back = static_cast<int>(index) + 2;
    if (back < ring.size) {
      wire.recv_reduce_send(ring.previous(), ring.next(), part(back, round));
    } else {
      wire.recv_reduce_copy_send(ring.previous(), {}, part(0, round));
    }
  };
  ring_rounds(blocks.rounds(chunk), static_cast<size_t>(ring.size - 1), lanes, start, receive);
}

/// Block r of rank r's output goes to all. If all of it is the root's block: a broadcast along a
/// chain.
template <class Wire>
RR_HOST_DEVICE void ring_allgather(Wire& wire, const Ring& ring, const Blocks& blocks, size_t chunk,
                                   size_t lanes = 1) {
  const RingChunks part{ring, blocks, chunk};
  const auto start = [&](size_t round) { wire.send_result(ring.next(), part(0, round)); };
  const auto receive = [&](size_t round, size_t index) {
    const int back = static_cast<int>(index) + 1;
    wire.recv_copy_send(ring.previous(), back < ring.size - 1 ? Peers(ring.next()) : Peers(),
                        part(back, round));
  };
  ring_rounds(blocks.rounds(chunk), static_cast<size_t>(ring.size - 1), lanes, start, receive);
}

/// Both, joined where they meet: of 2 (p - 1) receives p - 2 are partial sums, one is the finished
/// sum of the rank's own block, which it sends on in the same step, and p - 1 are results.
template <class Wire>
RR_HOST_DEVICE void ring_allreduce(Wire& wire, const Ring& ring, const Blocks& blocks, size_t chunk,
                                   size_t lanes = 1) {
  const RingChunks part{ring, blocks, chunk};
  const int last_sum = ring.size - 2;
  const auto start = [&](size_t round) { wire.send(ring.next(), part(1, round)); };
  const auto receive = [&](size_t round, size_t index) {
    const int number = static_cast<int>(index);
    if (number < last_sum) {
      wire.recv_reduce_send(ring.previous(), ring.next(), part(number + 2, round));
    } else if (number == last_sum) {
      wire.recv_reduce_copy_send(ring.previous(), ring.next(), part(0, round));
    } else if (number < 2 * ring.size - 3) {
      wire.recv_copy_send(ring.previous(), ring.next(), part(number - last_sum, round));
    } else {
      wire.recv_copy_send(ring.previous(), {}, part(ring.size - 1, round));
    }
  };
  ring_rounds(blocks.rounds(chunk), 2 * static_cast<size_t>(ring.size - 1), lanes, start, receive);
}

}  // namespace ringreduce
