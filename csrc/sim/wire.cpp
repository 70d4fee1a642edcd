#include "sim/wire.h"

#include <algorithm>
#include <numeric>
#include <string>

namespace ringreduce::sim {
namespace {

std::string name(Peer peer) {
  return "rank " + std::to_string(peer.rank) + " on channel " + std::to_string(peer.channel);
}

std::string name(Chunk chunk, Format format) {
  return "[" + std::to_string(chunk.offset) + ", " + std::to_string(chunk.end()) + ")" +
         (format == Format::partial ? " of partial sums" : " of results");
}

}  // namespace

Network::Network(Fibers& fibers, const Machine& machine, int size)
    : Network(fibers, machine, std::vector<int>(static_cast<size_t>(size))) {
  std::iota(fiber_of_.begin(), fiber_of_.end(), 0);
}

Network::Network(Fibers& fibers, const Machine& machine, std::vector<int> fiber_of, Ports* ports)
    : fibers_(fibers),
      machine_(machine),
      size_(fiber_of.size()),
      fifos_(size_ * size_ * num_channels),
      fiber_of_(std::move(fiber_of)),
      own_ports_(size_),
      ports_(ports ? *ports : own_ports_) {}

size_t Network::messages_left() const {
  size_t left = 0;
  for (const std::unique_ptr<Fifo>& fifo : fifos_) left += fifo ? fifo->packets.size() : 0;
  return left;
}

Network::Fifo& Network::fifo(int from, int to, int channel) {
  const size_t pair = static_cast<size_t>(from) * size_ + static_cast<size_t>(to);
  std::unique_ptr<Fifo>& fifo = fifos_[pair * num_channels + static_cast<size_t>(channel)];
  if (!fifo) fifo = std::make_unique<Fifo>(machine_.slots);
  return *fifo;
}

/// The sender has waited until a slot is free.
void Network::send(int from, Peer to, Packet packet) {
  Fifo& fifo = this->fifo(from, to.rank, to.channel);
  double& port_free = ports_[static_cast<size_t>(from)];
  const double begin = std::max({fibers_.clock(), fifo.idle_since, port_free});
  const double busy = static_cast<double>(packet.bytes.size()) * machine_.link.beta_s_per_byte;
  port_free = begin + busy;
  fifo.idle_since = packet.arrival = begin + machine_.link.alpha_s + busy;
  fifo.free_since.pop_front();
  fifo.packets.push_back(std::move(packet));
  fibers_.wake(fiber_of_[static_cast<size_t>(to.rank)]);
}

Wire::Wire(Network& network, int rank, const Message& message, Counts& counts)
    : network_(network),
      fibers_(network.fibers_),
      rank_(rank),
      message_(message),
      counts_(counts),
      delays_(network.machine_, rank) {
  fibers_.clock() += delays_.next();
}

void Wire::send_result(Peers to, Chunk chunk) {
  if (!start({}, to, chunk, Format::storage)) return;
  Packet packet{std::vector<char>(chunk.length * message_.item_bytes), chunk, Format::storage, 0};
  message_.for_each_run(message_.outputs, chunk, [&](const char* data, Chunk part) {
    std::copy_n(data, part.length * message_.item_bytes,
                &packet.bytes[(part.offset - chunk.offset) * message_.item_bytes]);
  });
  finish({}, to, packet);
}

void Wire::recv_reduce_send(Peers from, Peers to, Chunk chunk) {
  if (!start(from, to, chunk, Format::partial)) return;
  const size_t partial_bytes = partial_size_of(message_.reduction.dtype);
  Packet packet{std::vector<char>(chunk.length * partial_bytes), chunk, Format::partial, 0};
  const Target targets[] = {{packet.bytes.data(), Format::partial}};
  combine(from, chunk, targets);
  finish(from, to, packet);
}

void Wire::recv_reduce_copy_send(Peers from, Peers to, Chunk chunk) {
  if (!start(from, to, chunk, Format::partial)) return;
  Packet packet{std::vector<char>(chunk.length * message_.item_bytes), chunk, Format::storage, 0};
  const Target targets[] = {{packet.bytes.data(), Format::storage}};
  combine(from, chunk, targets);
  message_.copy_out(chunk, packet.bytes.data());
  finish(from, to, packet);
}

void Wire::recv_copy_send(Peers from, Peers to, Chunk chunk) {
  if (!start(from, to, chunk, Format::storage)) return;
  const Packet packet = incoming(*from.begin()).packets.front();
  message_.copy_out(chunk, packet.bytes.data());
  finish(from, to, packet);
}

void Wire::recv_reduce_keep(Peers from, Chunk chunk) {
  if (!start(from, {}, chunk, Format::partial)) return;
  kept_.resize(chunk.length * partial_size_of(message_.reduction.dtype));
  const Target targets[] = {{kept_.data(), Format::partial}};
  combine(from, chunk, targets);
  finish(from, {}, {});
}

/// Both sides add in order of rank.
void Wire::exchange(Peer with, Chunk chunk, bool last) {
  if (!start({}, with, chunk, Format::partial)) return;
  finish({}, with, {kept_, chunk, Format::partial, 0});
  if (!start(with, {}, chunk, Format::partial)) return;
  Source sources[] = {{kept_.data(), Format::partial},
                      {incoming(with).packets.front().bytes.data(), Format::partial}};
  if (with.rank < rank_) std::swap(sources[0], sources[1]);
  fibers_.clock() += static_cast<double>(kept_.size()) * network_.machine_.sum_s_per_byte;
  std::vector<char> result(last ? chunk.length * message_.item_bytes : 0);
  const Target target =
      last ? Target{result.data(), Format::storage} : Target{kept_.data(), Format::partial};
  reduce(message_.reduction, {&target, 1}, sources, chunk.length);
  if (last) message_.copy_out(chunk, result.data());
  finish(with, {}, {});
}

/// Waits for every message and every slot that the step needs, and moves the clock to that moment.
bool Wire::start(Peers from, Peers to, Chunk chunk, Format format) {
  if (chunk.empty()) return false;
  if (!fibers_.sleep([=, this] { return ready(from, to); },
                     [=, this] { return missing(from, to); })) {
    return false;
  }
  double& clock = fibers_.clock();
  for (const Peer& peer : to) clock = std::max(clock, outgoing(peer).free_since.front());
  for (const Peer& peer : from) {
    const Packet& packet = incoming(peer).packets.front();
    clock = std::max(clock, packet.arrival);
    const Chunk sent = packet.chunk;
    if (sent.offset != chunk.offset || sent.length != chunk.length || packet.format != format) {
      fibers_.fail("rank " + std::to_string(rank_) + " expects " + name(chunk, format) + " from " +
                   name(peer) + " and finds " + name(sent, packet.format));
      return false;
    }
  }
  clock += delays_.next();
  return true;
}

bool Wire::ready(Peers from, Peers to) {
  return std::none_of(from.begin(), from.end(),
                      [&](Peer peer) { return incoming(peer).packets.empty(); }) &&
         std::none_of(to.begin(), to.end(),
                      [&](Peer peer) { return outgoing(peer).free_since.empty(); });
}

std::string Wire::missing(Peers from, Peers to) {
  for (const Peer& peer : from) {
    if (incoming(peer).packets.empty()) return "a message from " + name(peer);
  }
  for (const Peer& peer : to) {
    if (outgoing(peer).free_since.empty()) return "a free slot to " + name(peer);
  }
  return "its turn";
}

/// Sends the packet on, and frees the slots of what was received.
void Wire::finish(Peers from, Peers to, const Packet& packet) {
  const double now = fibers_.clock();
  for (const Peer& peer : to) {
    network_.send(rank_, peer, packet);
    ++counts_.messages;
    counts_.bytes_sent += packet.bytes.size();
  }
  for (const Peer& peer : from) {
    Fifo& fifo = incoming(peer);
    counts_.bytes_received += fifo.packets.front().bytes.size();
    fifo.packets.pop_front();
    fifo.free_since.push_back(now);
    fibers_.wake(network_.fiber_of_[static_cast<size_t>(peer.rank)]);
  }
  ++counts_.primitives;
  counts_.finish_s = now;
}

/// The peers' partial sums first, in the order of `from`, then this rank's input: the order of
/// every Wire.
void Wire::combine(Peers from, Chunk chunk, std::span<const Target> targets) {
  const size_t partial_bytes = partial_size_of(message_.reduction.dtype);
  message_.for_each_run(message_.inputs, chunk, [&](const char* input, Chunk part) {
    const size_t skip = part.offset - chunk.offset;
    std::vector<Source> sources;
    for (const Peer& peer : from) {
      sources.push_back(
          {incoming(peer).packets.front().bytes.data() + skip * partial_bytes, Format::partial});
    }
    sources.push_back({input, message_.input_format});
    std::vector<Target> shifted;
    for (const Target& target : targets) {
      const size_t skip_bytes = skip * size_of(message_.reduction.dtype, target.format);
      shifted.push_back({static_cast<char*>(target.data) + skip_bytes, target.format});
    }
    reduce(message_.reduction, shifted, sources, part.length);
  });
  const size_t added_bytes = static_cast<size_t>(from.count) * chunk.length * partial_bytes;
  fibers_.clock() += static_cast<double>(added_bytes) * network_.machine_.sum_s_per_byte;
}

}  // namespace ringreduce::sim
