// The Wire between nodes: ring.h, tree.h and doubling.h run on it as they are. One communicator has
// several, each over other ranks: one per node that drive the network together, or all of them.
#pragma once

#include "base/chunk.h"
#include "net/links.h"
#include "reduce/message.h"

namespace ringreduce {

/// Who moves and adds where that is not for the CPU: its wire's slots and messages are device
/// memory. What it is told, it does later, and in this order.
class WireDevice {
 public:
  virtual ~WireDevice() = default;
  /// Memory that is known to it and to MPI.
  virtual char* slots(size_t size_bytes) = 0;
  virtual void reduce(const Reduction& reduction, std::span<const Target> targets,
                      std::span<const Source> sources, size_t count) = 0;
  virtual void copy(void* to, const void* from, size_t size_bytes) = 0;
  /// Until all has been done. False: stopped.
  virtual bool finish(Watch& watch) = 0;
};

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

  // Of a device: its kernels and the wait for them cost about 10 us for each message, in which
  // 400 Gbit/s carry half a MB. Derived, not measured.
  static constexpr size_t device_slot_bytes = size_t{1} << 20;

  /// `ranks`: MPI's numbers of the members, by the position that the algorithms name them by; this
  /// rank's is `rank`. `device`, if given, outlives the wire's use and knows rings only: they have
  /// two FIFOs, and doubling's running sum is the CPU's.
  NetWire(std::shared_ptr<Mpi> mpi, std::vector<int> ranks, int rank, int first_tag,
          WireDevice* device = nullptr)
      : links_(std::move(mpi), std::move(ranks), first_tag, device ? device_slot_bytes : slot_bytes,
               Links::Haste::large_messages, memory_of(device)),
        rank_(rank),
        device_(device) {}

  /// Starts a collective; both outlive it.
  void begin(const Message& message, Watch& watch);
  /// Ends it: all has left this process. False: stopped.
  bool end();

  /// Elements per chunk, so that a chunk fits a slot also as partial sums.
  size_t chunk_elements() const {
    return links_.slot_bytes() / partial_size_of(message_->reduction.dtype);
  }

  void send(Peers to, Chunk chunk) { recv_reduce_send({}, to, chunk); }
  void send_result(Peers to, Chunk chunk);
  void recv_reduce_send(Peers from, Peers to, Chunk chunk);
  void recv_reduce_copy_send(Peers from, Peers to, Chunk chunk);
  void recv_copy_send(Peers from, Peers to, Chunk chunk);
  void recv_reduce_keep(Peers from, Chunk chunk);
  void exchange(Peer with, Chunk chunk, bool last);

  /// False: MPI still has some of the slots.
  bool close() noexcept { return links_.close(); }

 private:
  /// The slots of one step, in the order of its peers.
  struct Slots {
    const char* from[2];
    char* to[2];
  };
  static Links::Memory memory_of(WireDevice* device) {
    if (!device) return {};
    return [device](size_t size_bytes) { return device->slots(size_bytes); };
  }
  void add(std::span<const Target> targets, std::span<const Source> sources, size_t count);
  void copy(char* to, const char* from, size_t size_bytes);
  bool wait_for(Peers from, size_t from_bytes, Peers to, Slots& slots);
  void advance(Peers from, Peers to, size_t to_bytes);

  Links links_;
  int rank_;
  WireDevice* const device_;
  const Message* message_ = nullptr;
  Watch* watch_ = nullptr;
  std::vector<char> kept_;  // a running sum, partial
  // For good: of a message that has stopped the peers have some parts and wait for the rest, which
  // a later one, begun before they know, must not be taken for.
  bool stopped_ = false;
};

}  // namespace ringreduce
