// The Wire between nodes: ring.h, tree.h and doubling.h run on it as they are. One communicator has
// several, each over other ranks: one per node that drive the network together, or all of them.
#pragma once

#include "base/chunk.h"
#include "net/links.h"
#include "reduce/message.h"

namespace ringreduce {

class NetWire {
 public:
  // With their headers such messages stay below 64 KB, up to which Open MPI sends over TCP at once.
  // Larger ones are announced first, and the answer then queues behind data that go the other way:
  // 256 KB in place of 60 KB took 1.46 x the bound of a full-duplex link of 1 Gbit/s, not 1.007 x
  // (25 MB, 2 hosts; network namespaces with a token bucket).
  static constexpr size_t slot_bytes = size_t{60} << 10;
  // Rounds of a ring under way at once: the link carries one chunk while another one is added.
  static constexpr size_t lanes = 4;
  static_assert(lanes + 1 <= Links::num_slots);

  /// `ranks`: MPI's numbers of the members, by the position that the algorithms name them by; this
  /// rank's is `rank`.
  NetWire(std::shared_ptr<Mpi> mpi, std::vector<int> ranks, int rank, int first_tag)
      : links_(std::move(mpi), std::move(ranks), first_tag, slot_bytes,
               Links::Haste::large_messages),
        rank_(rank) {}

  /// Starts a collective; both outlive it.
  void begin(const Message& message, Watch& watch);
  /// Ends it: all has left this process. False: stopped.
  bool end();

  /// Elements per chunk, so that a chunk fits a slot also as partial sums.
  size_t chunk_elements() const { return slot_bytes / partial_size_of(message_->reduction.dtype); }

  void send(Peers to, Chunk chunk) { recv_reduce_send({}, to, chunk); }
  void send_result(Peers to, Chunk chunk);
  void recv_reduce_send(Peers from, Peers to, Chunk chunk);
  void recv_reduce_copy_send(Peers from, Peers to, Chunk chunk);
  void recv_copy_send(Peers from, Peers to, Chunk chunk);
  void recv_reduce_keep(Peers from, Chunk chunk);
  void exchange(Peer with, Chunk chunk, bool last);

  void close() { links_.close(); }

 private:
  /// The slots of one step, in the order of its peers.
  struct Slots {
    const char* from[2];
    char* to[2];
  };
  bool wait_for(Peers from, size_t from_bytes, Peers to, Slots& slots);
  void advance(Peers from, Peers to, size_t to_bytes);

  Links links_;
  int rank_;
  const Message* message_ = nullptr;
  Watch* watch_ = nullptr;
  std::vector<char> kept_;  // a running sum, partial
  bool stopped_ = false;
};

}  // namespace ringreduce
