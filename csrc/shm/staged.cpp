#include "shm/staged.h"

namespace ringreduce {

Staged::Staged(Window& window, Phases phases, const Blocks& blocks)
    : window_(window), phases_(phases), blocks_(blocks) {
  chunk_ = window.chunk_bytes_ / window.message_->item_bytes;
  rounds_ = blocks.rounds(chunk_);
}

Meeting& Staged::meeting(size_t round) const { return window_.staged_round(slot(round)); }

void Staged::prepare_early() {
  if (rounds_ == 0) return;
  copy_round(0);
  early_ = true;
}

/// My contributions to the blocks of others, or my own finished block. Where slices are claimed,
/// anybody may reduce my block, so my contribution to it goes in, too.
void Staged::copy_round(size_t round) {
  const Message& message = *window_.message_;
  const Group& group = window_.group_;
  if (!reduces()) {
    message.copy_in(part(group.rank(), round), window_.result(group.rank(), slot(round)));
    return;
  }
  for (int block = 0; block < group.size(); ++block) {
    if (block == group.rank() && !group.claims()) continue;
    message.copy_in(part(block, round), window_.contribution(group.rank(), slot(round), block));
  }
}

void Staged::prepare(size_t round) {
  if (window_.stopped_) return;
  if (round > 0 || !early_) copy_round(round);
  const Group& group = window_.group_;
  if (!group.claims()) {
    group.own().prepared.publish(slot(round) + 1);
    return;
  }
  if (round == 0 && first_round_met_) return;
  Meeting& here = meeting(round);
  if (here.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 ==
      static_cast<uint32_t>(group.size())) {
    here.reset();
    here.go.publish(slot(round) + 1);
  }
}

bool Staged::wait_prepared(size_t round) {
  if (round == 0 && first_round_met_) return !window_.stopped_;
  const Group& group = window_.group_;
  if (group.claims()) return window_.wait_for(meeting(round).go, slot(round) + 1);
  for (int peer = 0; peer < group.size(); ++peer) {
    if (!window_.wait_for(group.control(peer).prepared, slot(round) + 1)) return false;
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
    window_.group_.own().combined.publish(slot(round) + 1);
  }
}

/// Reduces this rank's block from the peers' staging and its own input to its own output, and to
/// its result area if others want it.
void Staged::combine_owned(size_t round) {
  const Message& message = *window_.message_;
  const Group& group = window_.group_;
  const Chunk mine = part(group.rank(), round);
  std::vector<Source>& sources = window_.sources_;
  message.for_each_pair(mine, [&](char* input, char* output, Chunk piece) {
    const size_t offset_bytes = (piece.offset - mine.offset) * message.item_bytes;
    for (int peer = 0; peer < group.size(); ++peer) {
      const char* from = peer == group.rank()
                             ? input
                             : window_.contribution(peer, slot(round), group.rank()) + offset_bytes;
      sources[static_cast<size_t>(peer)] = {from, Format::storage};
    }
    const Target targets[] = {
        {output, Format::storage},
        {window_.result(group.rank(), slot(round)) + offset_bytes, Format::storage}};
    reduce(message.reduction, {targets, gathers() ? size_t{2} : size_t{1}}, sources, piece.length);
  });
}

/// Takes blocks of the round until none is left.
void Staged::combine_claimed(size_t round) {
  Meeting& here = meeting(round);
  const auto blocks = static_cast<uint64_t>(window_.group_.size());
  for (uint64_t claim; (claim = here.claimed.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
    combine_block(static_cast<int>(claim), round);
    if (here.completed.fetch_add(1, std::memory_order_acq_rel) + 1 == blocks) {
      here.done.publish(slot(round) + 1);
    }
  }
}

void Staged::combine_alone() {
  for (int block = 0; block < window_.group_.size(); ++block) combine_block(block, 0);
  meeting(0).done.publish(slot(0) + 1);
}

/// From the staging of all ranks to the result area in the staging of the block's rank.
void Staged::combine_block(int block, size_t round) {
  std::vector<Source>& sources = window_.sources_;
  for (int peer = 0; peer < window_.group_.size(); ++peer) {
    sources[static_cast<size_t>(peer)] = {window_.contribution(peer, slot(round), block),
                                          Format::storage};
  }
  const Target target{window_.result(block, slot(round)), Format::storage};
  reduce(window_.message_->reduction, {&target, 1}, sources, part(block, round).length);
}

/// Fetches the finished blocks that this rank wants and does not have.
void Staged::collect(size_t round) {
  const Group& group = window_.group_;
  const bool claimed = group.claims() && reduces();
  if (claimed && !window_.wait_for(meeting(round).done, slot(round) + 1)) return;
  for (int block = 0; block < group.size(); ++block) {
    const bool mine = block == group.rank();
    if (mine ? !claimed : !gathers()) continue;
    const bool owner_combines = reduces() && !claimed;
    if (owner_combines && !window_.wait_for(group.control(block).combined, slot(round) + 1)) return;
    if (window_.stopped_) return;
    window_.message_->copy_out(part(block, round), window_.result(block, slot(round)));
  }
}

}  // namespace ringreduce
