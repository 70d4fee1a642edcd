// The Window of the CPU: how ranks that share memory meet, and reduce each other's data where it
// lies. The algorithms over it are one_shot.h and two_shot.h. One Window per communicator; one
// collective at a time.
//
// Two ways of sharing the work, with the same bits as result. Where every rank has a core, each
// owns a part of the message, and ranks wait for each other's flags. Where ranks outnumber cores, a
// part would wait for its owner to be scheduled: there the last to come publishes "go", whoever
// runs takes the next slice, and who finishes the last one publishes "done".
#pragma once

#include <functional>
#include <vector>

#include "base/chunk.h"
#include "base/header.h"
#include "reduce/message.h"
#include "shm/group.h"

namespace ringreduce {

/// By how many staged rounds each phase runs ahead of the next one. None: with 1, which hides the
/// others' delays better but needs five slots in place of two, 16 KB took 1.3 to 1.7 times as long
/// and larger messages the same (two ranks, a core each), and 8 ranks on 2 cores needed 1.2 times
/// as long from 4 MB on.
inline constexpr size_t staged_lead = 0;

class Window {
 public:
  /// `staging` is a segment of at least staging_bytes(group).
  Window(Group& group, Segment staging);
  static size_t staging_bytes(const Group& group);

  /// What one_shot can take: bytes of input per rank.
  static constexpr size_t largest_share_bytes = size_t{64} << 10;
  /// What a rank contributes to one block in one staged round, at most.
  size_t chunk_bytes() const { return chunk_bytes_; }

  /// Starts a collective: `header` is what this rank says of it. All three outlive the collective.
  void begin(const Header& header, const Message& message, Watch& watch);

  /// Publishes the header, waits for those of all ranks and compares them. False: they differ
  /// (mismatch()), or the wait was stopped; then nothing of any peer's tensors was touched, and
  /// every call here does nothing.
  /// `alone`, if given, is run by the last to arrive before any other rank may go on; where no rank
  /// is the last, since each has a core and watches all others, by none.
  bool arrive(const std::function<void()>& alone = {});
  /// From now on, when the ranks of a collective had met is written there; null: nowhere.
  void note_meeting(int64_t* met_ns) { met_ns_ = met_ns; }
  bool mismatch() const { return mismatch_; }
  bool stopped() const { return stopped_; }
  /// After arrive: what a rank said. Valid until this rank arrives at the next collective.
  Header header_of(int rank) const;

  // one_shot
  void share_input(Chunk chunk);
  void reduce_to_self(Chunk chunk);

  // one_shot across nodes: one rank sums up what its node's ranks have shared, and shares the
  // result in place of its own input.
  void reduce_shares(const Reduction& reduction, size_t count, const Target& target);
  char* share(int rank, size_t bytes) const;
  /// When this rank has what it wants of the others' shares.
  void end_share(size_t bytes);

  // two_shot over symmetric tensors: where every rank's input and output lie in this process's
  // memory
  void set_symmetric(int rank, const char* input, char* output);
  void begin_symmetric(size_t count);
  bool next_slice(Chunk& slice);
  void reduce_to_all(Chunk slice);
  void done();
  /// Instead of these three, by the last to arrive: the whole message.
  void reduce_alone(size_t count) { reduce_slice({0, count}); }

 private:
  friend class Staged;
  bool wait_for(Flag& flag, uint64_t value);
  void stamp_meeting();
  bool arrive_by_flags();
  bool arrive_by_meeting(const std::function<void()>& alone);
  bool all_agree() const;
  void reduce_slice(Chunk slice);
  Meeting& staged_round(uint64_t round) const;
  char* slot(int rank, size_t index) const;
  Arrival& arrival_of(int rank) const;

  Group& group_;
  Segment staging_;
  size_t chunk_bytes_;
  size_t slot_bytes_;  // of the staging memory's slots, each as large as any message needs
  // Over the communicator's life; equal on all ranks.
  uint64_t next_slot_ = 0, next_round_ = 0;

  const Header* header_ = nullptr;
  uint64_t sequence_ = 0;  // the header's: others ask for theirs also when the caller's is gone
  const Message* message_ = nullptr;
  Watch* watch_ = nullptr;
  int64_t* met_ns_ = nullptr;
  uint64_t digest_ = 0;
  bool stopped_ = false, mismatch_ = false;

  // What reduce() is given: by rank, filled anew for each slice.
  std::vector<Source> sources_;
  std::vector<Target> targets_;

  // Of a symmetric two_shot.
  size_t slice_elements_ = 0, next_owned_ = 0;
  Chunk owned_;
  std::vector<const char*> symmetric_inputs_;
  std::vector<char*> symmetric_outputs_;
};

}  // namespace ringreduce
