// FIFOs of slots to other processes, through MPI's point-to-point messages: the ground on which the
// network's Wire and the agreement of the nodes stand. Receives are posted ahead, so that data come
// in while this rank is busy. A wait gives up the core at once and soon sleeps: the kernel, or a
// rank on the same core, may have to run for the message to arrive. One thread at a time.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "algorithms/topology.h"
#include "base/watch.h"
#include "net/mpi_api.h"

namespace ringreduce {

class Links {
 public:
  /// Messages under way per FIFO and direction.
  static constexpr uint64_t num_slots = 8;

  /// How long a wait looks without giving up the core, and then with, before it sleeps between
  /// looks.
  enum class Haste { small_messages, large_messages };

  /// The memory of one FIFO's slots, of so many bytes. Not freed here.
  using Memory = std::function<char*(size_t size_bytes)>;

  /// `ranks`: MPI's numbers of the ranks that peers are named by. Uses the tags
  /// [first_tag, first_tag + num_channels). `memory`: where slots lie; empty: on the heap.
  Links(std::shared_ptr<Mpi> mpi, std::vector<int> ranks, int first_tag, size_t slot_bytes,
        Haste haste, Memory memory = {});
  ~Links();

  /// The slot of the next message to a peer, once it is free; null if the watch stopped the wait.
  char* outgoing(Peer to, Watch& watch);
  /// False if the watch stopped it.
  bool send(Peer to, size_t size_bytes, Watch& watch);

  /// The next message of a peer, once it is here; null if the watch stopped the wait.
  const char* incoming(Peer from, Watch& watch, size_t* size_bytes = nullptr);
  void release(Peer from);

  /// Until all that was sent has left this process: nobody moves it on once the call has returned.
  bool flush(Watch& watch);

  /// Cancels the receives; nothing can be sent or received afterwards. Does not wait. False: MPI
  /// still has some of the slots.
  bool close() noexcept;

  size_t slot_bytes() const { return slot_bytes_; }

 private:
  struct Link {
    Peer peer;
    std::unique_ptr<char[], void (*)(char*)> memory;
    Mpi::Request requests[num_slots];
    uint64_t moved = 0;   // messages since the communicator began
    uint64_t posted = 0;  // incoming: receives; caught up when the next message is wanted
  };

  Link& find(std::vector<Link>& links, Peer peer);
  char* slot(const Link& link, uint64_t index) const {
    return link.memory.get() + index % num_slots * slot_bytes_;
  }
  void post(Link& link, uint64_t index);
  bool wait(Mpi::Request& request, Watch& watch, size_t* size_bytes);
  bool look(Mpi::Request& request, Watch& watch, size_t* size_bytes);
  template <class Operation>
  bool attempt(Watch& watch, Operation operation);

  std::shared_ptr<Mpi> mpi_;
  std::vector<int> ranks_;
  int first_tag_;
  size_t slot_bytes_;
  int looks_;  // of a wait, before it reads the clock
  int64_t spin_ns_, yield_ns_;
  const Memory memory_;
  std::vector<Link> incoming_, outgoing_;
};

}  // namespace ringreduce
