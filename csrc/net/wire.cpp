#include "net/wire.h"

#include <cstring>

#include "base/error.h"

namespace ringreduce {

void NetWire::begin(const Message& message, Watch& watch) {
  message_ = &message;
  watch_ = &watch;
}

bool NetWire::end() {
  if (!stopped_ && !links_.flush(*watch_)) stopped_ = true;
  return !stopped_;
}

/// Until the next message of every peer in `from` is here, and a slot to every peer in `to` is
/// free.
bool NetWire::wait_for(Peers from, size_t from_bytes, Peers to, Slots& slots) {
  int index = 0;
  for (const Peer& peer : from) {
    size_t received = 0;
    if (stopped_ || !(slots.from[index++] = links_.incoming(peer, *watch_, &received))) {
      stopped_ = true;
      return false;
    }
    if (received != from_bytes) {
      throw Error(ErrorCode::resource, "a peer sent " + std::to_string(received) + " bytes where " +
                                           std::to_string(from_bytes) + " belong");
    }
  }
  index = 0;
  for (const Peer& peer : to) {
    if (stopped_ || !(slots.to[index++] = links_.outgoing(peer, *watch_))) stopped_ = true;
  }
  return !stopped_;
}

void NetWire::add(std::span<const Target> targets, std::span<const Source> sources, size_t count) {
  if (device_) {
    device_->reduce(message_->reduction, targets, sources, count);
  } else {
    reduce(message_->reduction, targets, sources, count);
  }
}

void NetWire::copy(char* to, const char* from, size_t size_bytes) {
  if (device_) {
    device_->copy(to, from, size_bytes);
  } else {
    std::memcpy(to, from, size_bytes);
  }
}

/// What a device writes may be sent, and what it reads be written again, when it has done so.
void NetWire::advance(Peers from, Peers to, size_t to_bytes) {
  if (device_ && !device_->finish(*watch_)) {
    stopped_ = true;
    return;
  }
  for (const Peer& peer : to) {
    if (!links_.send(peer, to_bytes, *watch_)) stopped_ = true;
  }
  for (const Peer& peer : from) links_.release(peer);
}

void NetWire::send_result(Peers to, Chunk chunk) {
  Slots slots;
  if (chunk.empty() || !wait_for({}, 0, to, slots)) return;
  const Message& message = *message_;
  for (int peer = 0; peer < to.count; ++peer) {
    message.for_each_run(message.outputs, chunk, [&](const char* data, Chunk part) {
      copy(slots.to[peer] + (part.offset - chunk.offset) * message.item_bytes, data,
           part.length * message.item_bytes);
    });
  }
  advance({}, to, chunk.length * message.item_bytes);
}

void NetWire::recv_reduce_send(Peers from, Peers to, Chunk chunk) {
  const Message& message = *message_;
  const size_t partial_bytes = partial_size_of(message.reduction.dtype);
  const size_t chunk_bytes = chunk.length * partial_bytes;
  Slots slots;
  if (chunk.empty() || !wait_for(from, chunk_bytes, to, slots)) return;
  message.for_each_run(message.inputs, chunk, [&](const char* input, Chunk part) {
    const size_t offset_bytes = (part.offset - chunk.offset) * partial_bytes;
    Source sources[3];
    Target targets[2];
    size_t num_sources = 0, num_targets = 0;
    for (int peer = 0; peer < from.count; ++peer) {
      sources[num_sources++] = {slots.from[peer] + offset_bytes, Format::partial};
    }
    sources[num_sources++] = {input, message.input_format};
    for (int peer = 0; peer < to.count; ++peer) {
      targets[num_targets++] = {slots.to[peer] + offset_bytes, Format::partial};
    }
    add({targets, num_targets}, {sources, num_sources}, part.length);
  });
  advance(from, to, chunk_bytes);
}

void NetWire::recv_reduce_copy_send(Peers from, Peers to, Chunk chunk) {
  const Message& message = *message_;
  const size_t partial_bytes = partial_size_of(message.reduction.dtype);
  Slots slots;
  if (chunk.empty() || !wait_for(from, chunk.length * partial_bytes, to, slots)) return;
  message.for_each_pair(chunk, [&](const char* input, char* output, Chunk part) {
    const size_t offset = part.offset - chunk.offset;
    Source sources[3];
    Target targets[3] = {{output, Format::storage}, {}, {}};
    size_t num_sources = 0, num_targets = 1;
    for (int peer = 0; peer < from.count; ++peer) {
      sources[num_sources++] = {slots.from[peer] + offset * partial_bytes, Format::partial};
    }
    sources[num_sources++] = {input, message.input_format};
    for (int peer = 0; peer < to.count; ++peer) {
      targets[num_targets++] = {slots.to[peer] + offset * message.item_bytes, Format::storage};
    }
    add({targets, num_targets}, {sources, num_sources}, part.length);
  });
  advance(from, to, chunk.length * message.item_bytes);
}

void NetWire::recv_copy_send(Peers from, Peers to, Chunk chunk) {
  const Message& message = *message_;
  const size_t chunk_bytes = chunk.length * message.item_bytes;
  Slots slots;
  if (chunk.empty() || !wait_for(from, chunk_bytes, to, slots)) return;
  message.for_each_run(message.outputs, chunk, [&](char* output, Chunk part) {
    copy(output, slots.from[0] + (part.offset - chunk.offset) * message.item_bytes,
         part.length * message.item_bytes);
  });
  for (int peer = 0; peer < to.count; ++peer) copy(slots.to[peer], slots.from[0], chunk_bytes);
  advance(from, to, chunk_bytes);
}

void NetWire::recv_reduce_keep(Peers from, Chunk chunk) {
  const Message& message = *message_;
  const size_t partial_bytes = partial_size_of(message.reduction.dtype);
  Slots slots;
  if (chunk.empty() || !wait_for(from, chunk.length * partial_bytes, {}, slots)) return;
  kept_.resize(chunk.length * partial_bytes);
  message.for_each_run(message.inputs, chunk, [&](const char* input, Chunk part) {
    const size_t offset_bytes = (part.offset - chunk.offset) * partial_bytes;
    Source sources[3];
    size_t num_sources = 0;
    for (int peer = 0; peer < from.count; ++peer) {
      sources[num_sources++] = {slots.from[peer] + offset_bytes, Format::partial};
    }
    sources[num_sources++] = {input, message.input_format};
    const Target target{&kept_[offset_bytes], Format::partial};
    add({&target, 1}, {sources, num_sources}, part.length);
  });
  advance(from, {}, 0);
}

/// Both sides add in order of rank.
void NetWire::exchange(Peer with, Chunk chunk, bool last) {
  const Message& message = *message_;
  const size_t partial_bytes = partial_size_of(message.reduction.dtype);
  const size_t chunk_bytes = chunk.length * partial_bytes;
  Slots slots;
  if (chunk.empty() || !wait_for({}, 0, with, slots)) return;
  copy(slots.to[0], kept_.data(), chunk_bytes);
  advance({}, with, chunk_bytes);
  if (!wait_for(with, chunk_bytes, {}, slots)) return;
  const auto add_both = [&](size_t offset, size_t length, Target target) {
    Source sources[] = {{&kept_[offset * partial_bytes], Format::partial},
                        {slots.from[0] + offset * partial_bytes, Format::partial}};
    if (with.rank < rank_) std::swap(sources[0], sources[1]);
    add({&target, 1}, sources, length);
  };
  if (last) {
    message.for_each_run(message.outputs, chunk, [&](char* output, Chunk part) {
      add_both(part.offset - chunk.offset, part.length, {output, Format::storage});
    });
  } else {
    add_both(0, chunk.length, {kept_.data(), Format::partial});
  }
  advance(with, {}, 0);
}

}  // namespace ringreduce
