// The phases of staged_rounds (two_shot.h) on simulated ranks: which rank waits for what, and which
// slot of a rank's staging ring is written and read when. It exists to find the depth of that ring
// at which no order of events overwrites what somebody still has to read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "base/chunk.h"
#include "reduce/message.h"
#include "sim/fibers.h"
#include "sim/machine.h"
#include "sim/window.h"

namespace ringreduce::sim {

/// Slots that a rank needs for its rounds, with `lead` rounds between two phases. A rank that
/// prepares round r has combined round r - 1 - lead; so all ranks had prepared that one, and had
/// collected r - 2 - 3 lead.
constexpr size_t safe_depth(size_t lead) { return 3 * lead + 2; }

/// The staging memory of all ranks.
class Staging {
 public:
  /// `depth`: slots per rank.
  Staging(Fibers& fibers, const Machine& machine, int size, size_t depth);

 private:
  friend class Staged;

  /// Round r of all that is ever staged uses slot r mod depth: a place for each block.
  using Slot = std::vector<Place>;
  /// Counted per round and never reset, unlike on a real machine: `prepared` by rank, `combined` by
  /// block.
  struct Round {
    Times prepared, combined;
    int num_claimed = 0;  // blocks
  };

  Place& contribution(int rank, uint64_t round, int block) {
    std::vector<Slot>& slots = slots_[static_cast<size_t>(rank)];
    return slots[round % slots.size()][static_cast<size_t>(block)];
  }
  /// In place of the next rank's contribution.
  Place& result(int block, uint64_t round) {
    return contribution((block + 1) % static_cast<int>(slots_.size()), round, block);
  }
  // What must lie in a place when it is read.
  static uint64_t contributed(uint64_t round) { return 2 * round; }
  static uint64_t finished(uint64_t round) { return 2 * round + 1; }

  Fibers& fibers_;
  const Machine& machine_;
  std::vector<std::vector<Slot>> slots_;  // by rank
  std::map<uint64_t, Round> rounds_;
};

/// One rank's part of one collective.
class Staged {
 public:
  enum class Phases { reduce_scatter, allgather, allreduce };

  /// `rounds_before`: those of earlier collectives over the same memory; equal on all ranks.
  Staged(Staging& staging, int rank, Phases phases, const Blocks& blocks, size_t chunk,
         uint64_t rounds_before, const Message& message, Counts& counts);

  size_t rounds() const { return blocks_.rounds(chunk_); }

  void prepare(size_t round);
  void combine(size_t round);
  void collect(size_t round);

 private:
  bool reduces() const { return phases_ != Phases::allgather; }
  bool gathers() const { return phases_ != Phases::reduce_scatter; }
  Chunk part(int block, size_t round) const { return blocks_[block].piece(round, chunk_); }
  /// Gathers this rank's input.
  void write(Place& place, uint64_t version, Chunk chunk);
  void reduce_block(int block, size_t round);
  void fetched(size_t elements);
  bool wait_for_all(const Times& times, const char* what, uint64_t round);
  void step();

  Staging& staging_;
  Fibers& fibers_;
  int rank_;
  Phases phases_;
  Blocks blocks_;
  size_t chunk_;
  uint64_t first_round_;
  const Message& message_;
  Counts& counts_;
  Delays delays_;
};

}  // namespace ringreduce::sim
