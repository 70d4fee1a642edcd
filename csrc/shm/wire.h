// The Wire of the CPU: FIFOs of slots in shared memory, one for every pair of neighbours and
// channel, on which ring.h and tree.h run. The sender owns the memory of its FIFOs; `filled` is
// written by the sender alone, `emptied` by the receiver alone, and both only grow.
#pragma once

#include <vector>

#include "algorithms/topology.h"
#include "base/chunk.h"
#include "reduce/message.h"
#include "shm/group.h"

namespace ringreduce {

class ShmWire {
 public:
  static constexpr size_t slot_bytes = size_t{64} << 10;
  static constexpr uint64_t num_slots = 4;
  static size_t segment_bytes();

  /// `segment` has segment_bytes() of every rank.
  ShmWire(Group& group, Segment segment);

  /// Starts a collective; both outlive it.
  void begin(const Message& message, Watch& watch);
  /// Elements per chunk, so that a chunk fits a slot also as partial sums.
  size_t chunk_elements() const { return slot_bytes / partial_size_of(message_->reduction.dtype); }
  bool stopped() const { return stopped_; }

  void send(Peers to, Chunk chunk) { recv_reduce_send({}, to, chunk); }
  void send_result(Peers to, Chunk chunk);
  void recv_reduce_send(Peers from, Peers to, Chunk chunk);
  void recv_reduce_copy_send(Peers from, Peers to, Chunk chunk);
  void recv_copy_send(Peers from, Peers to, Chunk chunk);

 private:
  struct Fifo {
    alignas(line_bytes) Flag filled;
    alignas(line_bytes) Flag emptied;
    alignas(4096) char slots[num_slots][slot_bytes];
  };
  /// This rank's end of a FIFO; `moved` counts the chunks since the communicator began.
  struct Link {
    Peer peer;
    Fifo* fifo;
    uint64_t moved = 0;

    char* slot() const { return fifo->slots[moved % num_slots]; }
  };

  void connect(int channel, int from, int to, size_t index);
  static Link& find(std::vector<Link>& links, Peer peer);
  bool wait_for(Peers from, Peers to);
  void advance(Peers from, Peers to);

  Group& group_;
  Segment segment_;
  std::vector<Link> incoming_, outgoing_;
  const Message* message_ = nullptr;
  Watch* watch_ = nullptr;
  bool stopped_ = false;
};

}  // namespace ringreduce
