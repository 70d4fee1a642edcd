// Recursive doubling: in step k every rank exchanges its running sum with the rank whose number
// differs in bit k, so that after ceil(log2 p) messages all have the whole sum (Thakur,
// Rabenseifner, Gropp: "Optimization of collective communication operations in MPICH", 2005).
// Nothing has a lower latency; but each message is as long as the tensor, so it is for small ones
// only.
//
// Where p is no power of two, the ranks past the largest one below p give their data to a partner
// first and fetch the result at the end: at most two steps more (cost.h). Six ranks: 4 to 0 and 5
// to 1; then 0 with 1 and 2 with 3; then 0 with 2 and 1 with 3; then 0 to 4 and 1 to 5. Both sides
// of an exchange add in order of rank, so all ranks have the same bits. Beside those of ring.h the
// Wire has, on one running sum:
//   recv_reduce_keep(from, chunk)  the peers' partial sums + mine, kept
//   exchange(with, chunk, last)    sends what is kept, adds what comes, and keeps that; the last
//                                  time it is finished, and goes to the output
#pragma once

#include "algorithms/topology.h"
#include "base/chunk.h"

namespace ringreduce {

/// The ranks below `paired`, the largest power of two within size, exchange; the others are extra.
struct Doubling {
  int rank, size;

  RR_HOST_DEVICE constexpr int paired() const {
    int power = 1;
    while (2 * power <= size) power *= 2;
    return power;
  }
  RR_HOST_DEVICE constexpr bool is_extra() const { return rank >= paired(); }
  /// An extra rank's partner, or a partner's extra rank.
  RR_HOST_DEVICE constexpr Peers partner() const {
    const int other = is_extra() ? rank - paired() : rank + paired();
    return other < size ? Peers(Peer{other, doubling_channel}) : Peers();
  }
  RR_HOST_DEVICE constexpr int exchanges() const {
    int count = 0;
    for (int bit = 1; bit < paired(); bit *= 2) ++count;
    return count;
  }
};

/// Two ranks at least. One slot per FIFO is enough.
template <class Wire>
RR_HOST_DEVICE void doubling_allreduce(Wire& wire, int rank, int size, size_t count, size_t chunk) {
  const Doubling pairs{rank, size};
  const Peers partner = pairs.partner();
  for (size_t round = 0; round * chunk < count; ++round) {
    const Chunk part = Chunk{0, count}.piece(round, chunk);
    if (pairs.is_extra()) {
      wire.send(partner, part);
      wire.recv_copy_send(partner, {}, part);
      continue;
    }
    wire.recv_reduce_keep(partner, part);
    for (int bit = 1; bit < pairs.paired(); bit *= 2) {
      wire.exchange(Peer{rank ^ bit, doubling_channel}, part, 2 * bit == pairs.paired());
    }
    if (partner.count > 0) wire.send_result(partner, part);
  }
}

}  // namespace ringreduce
