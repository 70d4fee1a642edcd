#include "shm/wire.h"

#include <new>

#include "algorithms/tree.h"

namespace ringreduce {
namespace {

/// FIFOs that a rank can send to: ring; per tree one up and two down.
constexpr size_t fifos_per_rank = 1 + 2 * 3;
/// A chunk comes from at most two children, and this rank adds its own.
constexpr size_t most_sources = 3;

}  // namespace

size_t ShmWire::segment_bytes() { return fifos_per_rank * sizeof(Fifo); }

ShmWire::ShmWire(Group& group, Segment segment) : group_(group), segment_(std::move(segment)) {
  const int rank = group.rank(), size = group.size();
  const Ring ring{rank, size};
  connect(ring_channel, rank, ring.next().rank, 0);
  connect(ring_channel, ring.previous().rank, rank, 0);
  for (int tree = 0; tree < 2; ++tree) {
    const DoubleTree trees{size};
    const size_t first = 1 + 3 * static_cast<size_t>(tree);
    // Every edge of the tree has one FIFO up, the child's first, and one down, the parent's by
    // child.
    for (int child = 0; child < size; ++child) {
      const int parent = trees.place(tree, child).parent;
      if (parent == -1 || (child != rank && parent != rank)) continue;
      const size_t index = trees.place(tree, parent).children[0] == child ? 1 : 2;
      connect(up_channel + tree, child, parent, first);
      connect(down_channel + tree, parent, child, first + index);
    }
  }
}

void ShmWire::connect(int channel, int from, int to, size_t index) {
  Fifo* fifo = reinterpret_cast<Fifo*>(segment_.block(from)) + index;
  if (from == group_.rank()) outgoing_.push_back({{to, channel}, fifo});
  if (to == group_.rank()) incoming_.push_back({{from, channel}, fifo});
}

ShmWire::Link& ShmWire::find(std::vector<Link>& links, Peer peer) {
  for (Link& link : links) {
    if (link.peer.rank == peer.rank && link.peer.channel == peer.channel) return link;
  }
  __builtin_unreachable();  // both ends come from topology.h
}

void ShmWire::begin(const Message& message, Watch& watch) {
  message_ = &message;
  watch_ = &watch;
  stopped_ = false;
}

/// Until every peer in `from` has filled its next slot and every peer in `to` has emptied one.
bool ShmWire::wait_for(Peers from, Peers to) {
  for (const Peer& peer : from) {
    const Link& link = find(incoming_, peer);
    if (stopped_ || !wait(link.fifo->filled, link.moved + 1, group_.patience(), *watch_))
      stopped_ = true;
  }
  for (const Peer& peer : to) {
    const Link& link = find(outgoing_, peer);
    if (link.moved < num_slots) continue;
    const uint64_t freed = link.moved - num_slots + 1;
    if (stopped_ || !wait(link.fifo->emptied, freed, group_.patience(), *watch_)) stopped_ = true;
  }
  return !stopped_;
}

void ShmWire::advance(Peers from, Peers to) {
  for (const Peer& peer : to) {
    Link& link = find(outgoing_, peer);
    link.fifo->filled.publish(++link.moved);
  }
  for (const Peer& peer : from) {
    Link& link = find(incoming_, peer);
    link.fifo->emptied.publish(++link.moved);
  }
}

void ShmWire::send_result(Peers to, Chunk chunk) {
  if (chunk.empty() || !wait_for({}, to)) return;
  const Message& message = *message_;
  for (const Peer& peer : to) {
    char* slot = find(outgoing_, peer).slot();
    message.for_each_run(message.outputs, chunk, [&](const char* data, Chunk part) {
      std::memcpy(slot + (part.offset - chunk.offset) * message.item_bytes, data,
                  part.length * message.item_bytes);
    });
  }
  advance({}, to);
}

void ShmWire::recv_reduce_send(Peers from, Peers to, Chunk chunk) {
  if (chunk.empty() || !wait_for(from, to)) return;
  const Message& message = *message_;
  const size_t partial_bytes = partial_size_of(message.reduction.dtype);
  message.for_each_run(message.inputs, chunk, [&](const char* input, Chunk part) {
    const size_t offset_bytes = (part.offset - chunk.offset) * partial_bytes;
    Source sources[most_sources];
    Target targets[2];
    size_t num_sources = 0, num_targets = 0;
    for (const Peer& peer : from) {
      sources[num_sources++] = {find(incoming_, peer).slot() + offset_bytes, Format::partial, true};
    }
    sources[num_sources++] = {input, message.input_format};
    for (const Peer& peer : to) {
      targets[num_targets++] = {find(outgoing_, peer).slot() + offset_bytes, Format::partial};
    }
    reduce(message.reduction, {targets, num_targets}, {sources, num_sources}, part.length);
  });
  advance(from, to);
}

void ShmWire::recv_reduce_copy_send(Peers from, Peers to, Chunk chunk) {
  if (chunk.empty() || !wait_for(from, to)) return;
  const Message& message = *message_;
  const size_t partial_bytes = partial_size_of(message.reduction.dtype);
  message.for_each_pair(chunk, [&](const char* input, char* output, Chunk part) {
    const size_t offset = part.offset - chunk.offset;
    Source sources[most_sources];
    Target targets[3] = {{output, Format::storage}, {}, {}};
    size_t num_sources = 0, num_targets = 1;
    for (const Peer& peer : from) {
      sources[num_sources++] = {find(incoming_, peer).slot() + offset * partial_bytes,
                                Format::partial, true};
    }
    sources[num_sources++] = {input, message.input_format};
    for (const Peer& peer : to) {
      targets[num_targets++] = {find(outgoing_, peer).slot() + offset * message.item_bytes,
                                Format::storage};
    }
    reduce(message.reduction, {targets, num_targets}, {sources, num_sources}, part.length);
  });
  advance(from, to);
}

void ShmWire::recv_copy_send(Peers from, Peers to, Chunk chunk) {
  if (chunk.empty() || !wait_for(from, to)) return;
  const char* received = find(incoming_, *from.begin()).slot();
  for (const Peer& peer : to) {
    std::memcpy(find(outgoing_, peer).slot(), received, chunk.length * message_->item_bytes);
  }
  message_->copy_out(chunk, received, /*taking=*/true);
  advance(from, to);
}

}  // namespace ringreduce
