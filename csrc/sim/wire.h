// The simulated Wire: ring.h, tree.h and doubling.h run on it unchanged, with real data and in
// virtual time (machine.h). Every message says which chunk it carries and in which format, and the
// receiver insists on it: a schedule that pairs the wrong messages fails even where the numbers
// happen to come out right.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "algorithms/topology.h"
#include "base/chunk.h"
#include "reduce/message.h"
#include "sim/fibers.h"
#include "sim/machine.h"

namespace ringreduce::sim {

/// When a sender's port is free again.
using Ports = std::vector<double>;

/// All FIFOs between all ranks, made when first used.
class Network {
 public:
  Network(Fibers& fibers, const Machine& machine, int size);
  /// The same for ranks that are not fibers 0 .. size-1. `fiber_of` and `ports` are by rank; ports
  /// that other networks use, too, outlive them all.
  Network(Fibers& fibers, const Machine& machine, std::vector<int> fiber_of,
          Ports* ports = nullptr);
  Network(const Network&) = delete;

  /// Messages that nobody has received. After a correct collective there are none.
  size_t messages_left() const;

 private:
  friend class Wire;

  struct Packet {
    std::vector<char> bytes;
    Chunk chunk;
    Format format;
    double arrival;
  };

  struct Fifo {
    explicit Fifo(size_t slots) : free_since(slots, 0.0) {}
    std::deque<Packet> packets;     // sent and not yet used; each holds a slot
    std::deque<double> free_since;  // one entry per free slot: when it became free
    double idle_since = 0;          // when its last message arrived
  };

  Fifo& fifo(int from, int to, int channel);
  void send(int from, Peer to, Packet packet);

  Fibers& fibers_;
  const Machine& machine_;
  size_t size_;
  std::vector<std::unique_ptr<Fifo>> fifos_;  // by sender, receiver and channel
  std::vector<int> fiber_of_;
  Ports own_ports_;
  Ports& ports_;
};

/// One rank's end; used by that rank's fiber only. The primitives are those of ring.h and
/// doubling.h.
class Wire {
 public:
  /// `message`, `network` and `counts` outlive it.
  Wire(Network& network, int rank, const Message& message, Counts& counts);

  void send(Peers to, Chunk chunk) { recv_reduce_send({}, to, chunk); }
  void send_result(Peers to, Chunk chunk);
  void recv_reduce_send(Peers from, Peers to, Chunk chunk);
  void recv_reduce_copy_send(Peers from, Peers to, Chunk chunk);
  void recv_copy_send(Peers from, Peers to, Chunk chunk);
  void recv_reduce_keep(Peers from, Chunk chunk);
  void exchange(Peer with, Chunk chunk, bool last);

 private:
  using Packet = Network::Packet;
  using Fifo = Network::Fifo;

  Fifo& incoming(Peer peer) { return network_.fifo(peer.rank, rank_, peer.channel); }
  Fifo& outgoing(Peer peer) { return network_.fifo(rank_, peer.rank, peer.channel); }
  bool start(Peers from, Peers to, Chunk chunk, Format format);
  bool ready(Peers from, Peers to);
  std::string missing(Peers from, Peers to);
  void finish(Peers from, Peers to, const Packet& packet);
  void combine(Peers from, Chunk chunk, std::span<const Target> targets);

  Network& network_;
  Fibers& fibers_;
  int rank_;
  const Message& message_;
  Counts& counts_;
  Delays delays_;
  std::vector<char> kept_;  // the running sum of exchanges
};

}  // namespace ringreduce::sim
