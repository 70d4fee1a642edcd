#include "shm/staged.h"

#include <algorithm>

namespace ringreduce {
namespace {

constexpr size_t streamed_bytes = size_t{16} << 10;  // reduced, then streamed from the cache

}  // namespace

Staged::Staged(Window& window, Phases phases, const Blocks& blocks)
    : window_(window), phases_(phases), blocks_(blocks) {
  const size_t item_bytes = window.message_->item_bytes;
  const size_t line = line_bytes / item_bytes;
  // As few rounds as can be, and all about equally large.
  rounds_ = blocks.rounds(window.chunk_bytes_ / item_bytes);
  if (rounds_ == 0) return;
  chunk_ = ((blocks.largest() + rounds_ - 1) / rounds_ + line - 1) / line * line;
  rounds_ = blocks.rounds(chunk_);
  slot_bytes_ = chunk_ * item_bytes * static_cast<size_t>(blocks.size());
}

char* Staged::contribution(int rank, size_t round, int block) const {
  return window_.staging_.block(rank) + window_.ring_.offset(slot_bytes_, round) +
         static_cast<size_t>(block) * chunk_ * window_.message_->item_bytes;
}

Meeting& Staged::meeting(size_t round) const { return window_.staged_round(number(round)); }

void Staged::prepare_early() {
  if (rounds_ == 0) return;
  copy_round(0);
  early_ = true;
}

void Staged::copy_in(Chunk chunk, char* to) {
  const Message& message = *window_.message_;
  message.for_each_run(message.inputs, chunk, [&](const char* input, Chunk part) {
    window_.store_.copy(to + (part.offset - chunk.offset) * message.item_bytes, input,
                        part.length * message.item_bytes);
  });
}

/// My contributions to the blocks of others, or my own finished block. Where slices are claimed,
/// anybody may reduce my block, so my contribution to it goes in, too.
void Staged::copy_round(size_t round) {
  const Group& group = window_.group_;
  if (!reduces()) {
    copy_in(part(group.rank(), round), result(group.rank(), round));
    return;
  }
  for (int block = 0; block < group.size(); ++block) {
    if (block == group.rank() && !group.claims()) continue;
    copy_in(part(block, round), contribution(group.rank(), round, block));
  }
}

void Staged::prepare(size_t round) {
  if (window_.stopped_) return;
  if (round > 0 || !early_) copy_round(round);
  const Group& group = window_.group_;
  if (!group.claims()) {
    group.own().prepared.publish(number(round) + 1);
    return;
  }
  if (round == 0 && first_round_met_) return;
  Meeting& here = meeting(round);
  if (here.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 ==
      static_cast<uint32_t>(group.size())) {
    here.reset();
    here.go.publish(number(round) + 1);
  }
}

bool Staged::wait_prepared(size_t round) {
  if (round == 0 && first_round_met_) return !window_.stopped_;
  const Group& group = window_.group_;
  if (group.claims()) return window_.wait_for(meeting(round).go, number(round) + 1);
  for (int peer = 0; peer < group.size(); ++peer) {
    if (!window_.wait_for(group.control(peer).prepared, number(round) + 1)) return false;
  }
  return true;
}

void Staged::combine(size_t round) {
  if (!wait_prepared(round) || !reduces()) return;
  if (round == 0 && first_round_combined_) return;
  if (window_.group_.claims()) {
    combine_claimed(round);
  } else {
    combine_owned(round);
    window_.group_.own().combined.publish(number(round) + 1);
  }
}

/// Reduces this rank's block from the peers' staging and its own input to its own output, and to
/// its result area if others want it: in one pass, or, where a plain store to that area is dear, by
/// a copy of what is still in the first-level cache.
void Staged::combine_owned(size_t round) {
  const Message& message = *window_.message_;
  const Group& group = window_.group_;
  const Chunk mine = part(group.rank(), round);
  std::vector<Source>& sources = window_.sources_;
  const bool streams = gathers() && window_.store_.streams();
  const size_t step = streams ? streamed_bytes / message.item_bytes : mine.length;
  char* const shared = result(group.rank(), round);
  message.for_each_pair(mine, [&](char* input, char* output, Chunk piece) {
    for (size_t begin = 0; begin < piece.length; begin += step) {
      const size_t length = std::min(step, piece.length - begin);
      const size_t offset_bytes = (piece.offset + begin - mine.offset) * message.item_bytes;
      for (int peer = 0; peer < group.size(); ++peer) {
        const char* from = peer == group.rank()
                               ? input + begin * message.item_bytes
                               : contribution(peer, round, group.rank()) + offset_bytes;
        sources[static_cast<size_t>(peer)] = {from, Format::storage};
      }
      char* const own = output + begin * message.item_bytes;
      const Target targets[] = {{own, Format::storage}, {shared + offset_bytes, Format::storage}};
      const size_t num_targets = gathers() && !streams ? 2 : 1;
      reduce(message.reduction, {targets, num_targets}, sources, length);
      if (streams) stream_copy(shared + offset_bytes, own, length * message.item_bytes);
    }
  });
}

/// Takes blocks of the round until none is left.
void Staged::combine_claimed(size_t round) {
  Meeting& here = meeting(round);
  const auto blocks = static_cast<uint64_t>(window_.group_.size());
  for (uint64_t claim; (claim = here.claimed.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
    combine_block(static_cast<int>(claim), round);
    if (here.completed.fetch_add(1, std::memory_order_acq_rel) + 1 == blocks) {
      here.done.publish(number(round) + 1);
    }
  }
}

void Staged::combine_alone() {
  for (int block = 0; block < window_.group_.size(); ++block) combine_block(block, 0);
  meeting(0).done.publish(number(0) + 1);
}

/// From the staging of all ranks to the result area in the staging of the block's rank.
void Staged::combine_block(int block, size_t round) {
  std::vector<Source>& sources = window_.sources_;
  for (int peer = 0; peer < window_.group_.size(); ++peer) {
    sources[static_cast<size_t>(peer)] = {contribution(peer, round, block), Format::storage};
  }
  const Target target{result(block, round), Format::storage};
  reduce(window_.message_->reduction, {&target, 1}, sources, part(block, round).length);
}

/// Fetches the finished blocks that this rank wants and does not have.
void Staged::collect(size_t round) {
  const Group& group = window_.group_;
  const bool claimed = group.claims() && reduces();
  if (claimed && !window_.wait_for(meeting(round).done, number(round) + 1)) return;
  for (int block = 0; block < group.size(); ++block) {
    const bool mine = block == group.rank();
    if (mine ? !claimed : !gathers()) continue;
    const bool owner_combines = reduces() && !claimed;
    if (owner_combines && !window_.wait_for(group.control(block).combined, number(round) + 1))
      return;
    if (window_.stopped_) return;
    window_.message_->copy_out(part(block, round), result(block, round));
  }
}

}  // namespace ringreduce
