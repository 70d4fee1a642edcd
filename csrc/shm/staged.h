// Tensors in private memory, staged through the window in rounds: the phases of two_shot.h's
// staged_rounds, for reduce_scatter, allgather, and both.
//
// Every round has a slot in the staging memory of each rank, in turn: an area per block, for this
// rank's contribution to it. A block's result takes the place of what the rank after the block's
// own has contributed to it, or would have. Who may write into a round's slots, any rank's, without
// waiting for anybody: with `lead` rounds between two phases, a rank that prepares round r has
// combined round r - 1 - lead, so all ranks had prepared that one, and so had left round
// r - 2 - 3 lead behind in every phase. So 3 lead + 2 slots will do, also from one collective to
// the next. Within a round only the one who reduces a block reads its contributions, and writes
// the result, after all have prepared. Two counters per rank are enough: prepared and combined.
#pragma once

#include "shm/window.h"

namespace ringreduce {

class Staged {
 public:
  enum class Phases { reduce_scatter, allgather, allreduce };
  Staged(Window& window, Phases phases, const Blocks& blocks);

  size_t rounds() const { return rounds_; }
  static constexpr size_t lead() { return staged_lead; }

  /// Round 0 may be prepared before the ranks meet, since that touches nothing but this rank's
  /// staging. Then their arrival says that it is done, if `all_did` so.
  void prepare_early();
  /// `combined`: and whether combine_alone() has been called.
  void met(bool all_did, bool combined) {
    first_round_met_ = all_did;
    first_round_combined_ = combined;
  }

  /// All of round 0 by one rank, while the others wait to go on: nothing is left but to collect.
  void combine_alone();

  void prepare(size_t round);
  void combine(size_t round);
  void collect(size_t round);
  /// After the last round.
  void finish() {
    window_.next_round_ += rounds_;
    window_.next_slot_ += rounds_;
  }

 private:
  bool gathers() const { return phases_ != Phases::reduce_scatter; }
  bool reduces() const { return phases_ != Phases::allgather; }
  Chunk part(int block, size_t round) const { return blocks_[block].piece(round, chunk_); }
  /// What is published of a round is counted over the life of the communicator.
  uint64_t number(size_t round) const { return window_.next_round_ + round; }
  char* contribution(int rank, size_t round, int block) const;
  char* result(int rank, size_t round) const;
  Meeting& meeting(size_t round) const;
  void copy_round(size_t round);
  bool wait_prepared(size_t round);
  void combine_owned(size_t round);
  void combine_claimed(size_t round);
  void combine_block(int block, size_t round);

  Window& window_;
  Phases phases_;
  Blocks blocks_;
  size_t rounds_ = 0, chunk_ = 0;
  bool early_ = false, first_round_met_ = false, first_round_combined_ = false;
};

}  // namespace ringreduce
