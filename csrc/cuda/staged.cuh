// Tensors in private memory, staged through the slabs in rounds: the phases of two_shot.h's
// staged_rounds for one block of threads, for reduce_scatter, allgather, and both.
//
// In each round a block has one piece of every rank's part of the message. The pieces' places in
// the staging memory belong to this block and this round's slot:
//   of another rank's part   what this rank adds to it; its owner reads it
//   of this rank's own part  the finished piece; everybody reads it
// Who may write them without waiting. At its step s a rank prepares round s. It has combined round
// s - 1 - lead before, so all ranks had prepared that one, and so had left their step
// s - 2 - lead behind, with all that they read of round s - 2 - 3 lead: with 3 lead + 2 slots,
// nobody reads the slot's earlier round any more. The first round of call c is prepared before
// anybody has arrived. It lies in the half of c's parity, which was last used in call c - 2; all
// ranks had left that one when they arrived in c - 1.
#pragma once

#include "base/chunk.h"
#include "cuda/copy.cuh"
#include "cuda/reduce.cuh"
#include "cuda/slab.h"
#include "cuda/team.cuh"

namespace ringreduce::cuda {

template <class Stored>
class Staged {
 public:
  static constexpr size_t lead = 1;

  __device__ Staged(Team& team, const DeviceCall& call)
      : team_(team), call_(call), blocks_(blocks_of(call)) {
    constexpr size_t granule = granule_of(sizeof(Stored));
    const auto blocks = static_cast<size_t>(team.blocks());
    places_ = call.division == Division::single ? 1 : static_cast<size_t>(call.size);
    const size_t most_bytes = staging_bytes / 2 / slots / blocks / places_;
    const size_t most = most_bytes / staging_granule_bytes * granule;
    // As few rounds as can be, and all about equally large.
    const size_t share = (blocks_.largest() + blocks - 1) / blocks;
    rounds_ = (share + most - 1) / most;
    if (rounds_ > 0) piece_ = round_up((share + rounds_ - 1) / rounds_, granule);
  }

  __device__ size_t rounds() const { return rounds_; }

  /// Puts what others want from this rank into its staging memory. In the first round, or, if there
  /// is none, in finish(), all ranks meet.
  __device__ void prepare(size_t round) {
    if (team_.stopped()) return;
    copy_all(Prepare{*this, round});
    if (round == 0) {
      team_.announce();
      team_.met();
    } else {
      team_.publish(Step::prepared, number(round));
    }
  }

  /// After the last round.
  __device__ void finish() {
    if (rounds_ > 0) return;
    team_.announce();
    team_.met();
  }

  __device__ void combine(size_t round) {
    if (team_.stopped() || (round > 0 && !team_.wait(Step::prepared, number(round)))) return;
    if (!call_.reduces) return;
    reduce_block<Stored>(call_.op, call_.size, Combine{*this, part(call_.rank, round), round},
                         part(call_.rank, round).length);
    if (call_.gathers) team_.publish(Step::combined, number(round));
  }

  __device__ void collect(size_t round) {
    if (team_.stopped() || !call_.gathers) return;
    if (call_.reduces && !team_.wait(Step::combined, number(round))) return;
    copy_all(Collect{*this, round});
  }

 private:
  static constexpr size_t slots = 3 * lead + 2;

  __device__ static Blocks blocks_of(const DeviceCall& call) {
    switch (call.division) {
      case Division::table:
        return Blocks::table(call.offsets, call.size);
      case Division::single:
        return Blocks::single(call.count, call.size, call.owner);
      case Division::even:
        break;
    }
    return Blocks::even(call.count, call.size, granule_of(sizeof(Stored)));
  }

  __device__ static uint32_t number(size_t round) { return static_cast<uint32_t>(round) + 1; }

  __device__ Chunk part(int owner, size_t round) const {
    const size_t index = round * static_cast<size_t>(team_.blocks());
    return blocks_[owner].piece(index + static_cast<size_t>(team_.block()), piece_);
  }
  __device__ size_t piece_bytes() const { return piece_ * sizeof(Stored); }

  /// Where the piece of `owner`'s part lies in `rank`'s slab.
  __device__ char* place(int rank, size_t round, int owner) const {
    const size_t row = round % slots * static_cast<size_t>(team_.blocks());
    const size_t index = (row + static_cast<size_t>(team_.block())) * places_;
    const size_t place = places_ == 1 ? 0 : static_cast<size_t>(owner);
    return team_.slab(rank).staging(team_.parity()) + (index + place) * piece_bytes();
  }

  /// The input holds the whole message, or in an allgather this rank's part alone.
  __device__ const char* input(Chunk chunk) const {
    const size_t first = call_.reduces ? 0 : blocks_[call_.rank].offset;
    return call_.input + (chunk.offset - first) * sizeof(Stored);
  }
  /// The output holds the whole message, or in a reduce_scatter this rank's part alone.
  __device__ char* output(Chunk chunk) const {
    const size_t first = call_.gathers ? 0 : blocks_[call_.rank].offset;
    return call_.output + (chunk.offset - first) * sizeof(Stored);
  }

  struct Moves {
    const Staged& of;
    size_t round;

    __device__ int count() const { return of.call_.size; }
    __device__ size_t most_bytes() const { return of.piece_bytes(); }
    __device__ bool mine(int owner) const { return owner == of.call_.rank; }
    __device__ Chunk part(int owner) const { return of.part(owner, round); }
  };

  /// Move k is about rank k's part: to a reduction others are served, else this rank serves all.
  struct Prepare : Moves {
    __device__ size_t size_bytes(int owner) const {
      return this->mine(owner) == this->of.call_.reduces
                 ? 0
                 : this->part(owner).length * sizeof(Stored);
    }
    __device__ const char* from(int owner) const { return this->of.input(this->part(owner)); }
    __device__ char* to(int owner) const {
      return this->of.place(this->of.call_.rank, this->round, owner);
    }
  };

  /// Its own part a rank has: from combine, or as its input, which may be the output's memory.
  struct Collect : Moves {
    __device__ size_t size_bytes(int owner) const {
      const bool has = this->mine(owner) && (this->of.call_.reduces || from(owner) == to(owner));
      return has ? 0 : this->part(owner).length * sizeof(Stored);
    }
    __device__ const char* from(int owner) const {
      return this->mine(owner) ? this->of.input(this->part(owner))
                               : this->of.place(owner, this->round, owner);
    }
    __device__ char* to(int owner) const { return this->of.output(this->part(owner)); }
  };

  /// This rank's part, from all ranks in rank order.
  struct Combine {
    const Staged& of;
    Chunk chunk;
    size_t round;

    __device__ int sources() const { return of.call_.size; }
    __device__ int targets() const { return of.call_.gathers && of.call_.size > 1 ? 2 : 1; }
    __device__ const char* source(int rank) const {
      return rank == of.call_.rank ? of.input(chunk) : of.place(rank, round, of.call_.rank);
    }
    __device__ char* target(int t) const {
      return t == 0 ? of.output(chunk) : of.place(of.call_.rank, round, of.call_.rank);
    }
  };

  Team& team_;
  const DeviceCall& call_;
  const Blocks blocks_;
  size_t rounds_ = 0, piece_ = 0, places_ = 1;
};

}  // namespace ringreduce::cuda
