#include "shm/staged.h"

namespace ringreduce {

Staged::Staged(Window& window, Phases phases, const Blocks& blocks)
    : window_(window), phases_(phases), blocks_(blocks) {
  const size_t item_bytes = window.message_->item_bytes;
  const size_t line = line_bytes / item_bytes;
  // As few rounds as can be, and all about equally large.
  rounds_ = blocks.rounds(window.chunk_bytes_ / item_bytes);
  if (rounds_ == 0) return;
  chunk_ = ((blocks.largest() + rounds_ - 1) / rounds_ + line - 1) / line * line;
  rounds_ = blocks.rounds(chunk_);
}

char* Staged::contribution(int rank, size_t round, int block) const {
  return window_.slot(rank, round) +
         static_cast<size_t>(block) * chunk_ * window_.message_->item_bytes;
}

/// Of the rank's block, where the next rank's contribution to it was: whoever has read that has the
/// lines in its cache, and the next rank, having read the result, will find them in its own.
char* Staged::result(int rank, size_t round) const {
  return contribution((rank + 1) % window_.group_.size(), round, rank);
}

Meeting& Staged::meeting(size_t round) const { return window_.staged_round(number(round)); }

void Staged::prepare_early() {
  if (rounds_ == 0) return;
  copy_round(0);
  early_ = true;
}

/// My contributions to the blocks of others, or my own finished block. Where slices are claimed,
/// anybody may reduce my block, so my contribution to it goes in, too.
void Staged::copy_round(size_t round) {
  const Group& group = window_.group_;
  if (!reduces()) {
    window_.message_->copy_in(part(group.rank(), round), result(group.rank(), round));
    return;
  }
  for (int block = 0; block < group.size(); ++block) {
    if (block == group.rank() && !group.claims()) continue;
    window_.message_->copy_in(part(block, round), contribution(group.rank(), round, block));
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
/// its result area if others want it.
void Staged::combine_owned(size_t round) {
  const Message& message = *window_.message_;
  const Group& group = window_.group_;
  const Chunk mine = part(group.rank(), round);
  std::vector<Source>& sources = window_.sources_;
  message.for_each_pair(mine, [&](char* input, char* output, Chunk piece) {
    const size_t offset_bytes = (piece.offset - mine.offset) * message.item_bytes;
    for (int peer = 0; peer < group.size(); ++peer) {
      Source& source = sources[static_cast<size_t>(peer)];
      source = {input, Format::storage};
      if (peer == group.rank()) continue;
      const char* const theirs = contribution(peer, round, group.rank());
      source = {theirs + offset_bytes, Format::storage, theirs != result(group.rank(), round)};
    }
    const Target targets[] = {
        {output, Format::storage},
        {result(group.rank(), round) + offset_bytes, Format::storage},
    };
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
      here.done.publish(number(round) + 1);
    }
  }
}

void Staged::combine_alone() {
  for (int block = 0; block < window_.group_.size(); ++block) combine_block(block, 0);
  meeting(0).done.publish(number(0) + 1);
}

/// From the staging of all ranks to where the block's result belongs.
void Staged::combine_block(int block, size_t round) {
  std::vector<Source>& sources = window_.sources_;
  for (int peer = 0; peer < window_.group_.size(); ++peer) {
    const char* const theirs = contribution(peer, round, block);
    sources[static_cast<size_t>(peer)] = {theirs, Format::storage, theirs != result(block, round)};
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
    const bool only_reader = group.size() == 2 && !claimed;
    window_.message_->copy_out(part(block, round), result(block, round), only_reader);
  }
}

}  // namespace ringreduce
