// The simulated Window: one_shot.h and two_shot.h run on it unchanged, with real data, in virtual
// time (machine.h) and in any order of events that the code allows. Memory that is used again and
// again consists of places that know what they hold: a rank that writes one too early is found out
// by whoever comes to read it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "base/chunk.h"
#include "reduce/message.h"
#include "sim/fibers.h"
#include "sim/machine.h"

namespace ringreduce::sim {

/// Where one rank puts data for others to read, and later other data. Stops everything if that goes
/// wrong.
class Place {
 public:
  /// `version`: a number that readers name, too. Others may run before `fill` is called.
  void write(Fibers& fibers, uint64_t version, const std::function<void(std::vector<char>&)>& fill);
  /// The data, which must be those of `version` until close. Others may run meanwhile. `name` is
  /// for the report.
  const char* open(Fibers& fibers, uint64_t version, const std::string& name);
  void close() { --num_readers_; }

 private:
  std::vector<char> data_;
  uint64_t version_ = 0;  // 0: none yet
  bool writing_ = false;
  int num_readers_ = 0;
};

/// The moments at which each of several ranks has done something.
using Times = std::vector<double>;

/// What the ranks of a node share.
class SharedMemory {
 public:
  /// `blocks`: who owns what. `slice`: what a rank takes at a time, in elements. `places`: for the
  /// inputs of one_shot, per rank, used by turns; two are enough.
  SharedMemory(Fibers& fibers, const Machine& machine, const Blocks& blocks, size_t slice,
               size_t places = 2);

 private:
  friend class Window;

  /// One collective. Fast ranks may be in the next one already, so each has its own.
  struct Call {
    std::vector<const Message*> messages;  // by rank; valid until the last has finished
    std::set<size_t> counts;               // of elements; more than one: a mismatch
    Times arrived, finished;
    size_t num_claimed = 0;
  };

  Call& call(uint64_t sequence);
  int size() const { return blocks_.size(); }

  Fibers& fibers_;
  const Machine& machine_;
  Blocks blocks_;
  size_t slice_;
  std::map<uint64_t, Call> calls_;
  std::vector<std::vector<Place>> shares_;  // by rank
};

/// One rank's end; used by that rank's fiber only.
class Window {
 public:
  Window(SharedMemory& shared, int rank);

  /// Starts a collective; both outlive it, and the message lies in one piece.
  void begin(const Message& message, Counts& counts);

  /// Waits for all ranks. False: they disagree on the number of elements, and nothing is touched.
  bool arrive();

  // one_shot
  void share_input(Chunk chunk);
  void reduce_to_self(Chunk chunk);

  // two_shot, after arrive
  bool next_slice(Chunk& slice);
  void reduce_to_all(Chunk slice);
  void done();

 private:
  SharedMemory::Call& call() { return shared_.call(sequence_); }
  Place& share(int rank);
  void step();
  bool meet(const Times& times, const char* what);
  void move(size_t fetched_bytes, size_t stored_bytes);

  SharedMemory& shared_;
  Fibers& fibers_;
  int rank_;
  Delays delays_;
  uint64_t sequence_ = 0;  // of the collective, from 1
  const Message* message_ = nullptr;
  Counts* counts_ = nullptr;
  size_t num_taken_ = 0;
};

}  // namespace ringreduce::sim
