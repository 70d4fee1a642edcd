// The ranks of a node as members of one communicator: their control memory, who is alive, and the
// abort that ends a communicator for all of them. Ranks are numbered within the group here; what is
// said of them, in words and in an AbortRecord, is their number in the communicator.
#pragma once

#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "shm/control.h"
#include "shm/node.h"
#include "shm/wait.h"

namespace ringreduce {

/// Why a communicator is dead, as the first detector published it.
struct AbortRecord {
  ErrorCode code = ErrorCode::none;
  int culprit = -1;
  int detector = -1;
  std::string reason;
};

/// The ranks of other nodes, as far as a wait has to know of them.
class Remote {
 public:
  virtual ~Remote() = default;
  /// One that departed before it came to collective `sequence`.
  virtual std::optional<AbortRecord> find_lost(uint64_t sequence) = 0;
  /// Whoever has a rank that did not come there within this time aborts, and names it.
  virtual void ask(uint64_t sequence, double after_s) = 0;
};

/// What this host is called, for messages.
std::string host_name();

class Group {
 public:
  /// Collective. Maps the control segment and proves by a nonce that the memory is shared.
  Group(Node& node, bool in_process, Deadline deadline);
  ~Group();

  int rank() const { return rank_; }
  int size() const { return size_; }
  /// The rank's number in the communicator, of which the node may hold only some.
  int number_of(int rank) const { return numbers_[static_cast<size_t>(rank)]; }
  RankControl& control(int rank) const { return *controls_[static_cast<size_t>(rank)]; }
  RankControl& own() const { return *own_; }
  GroupControl& shared() const { return *shared_; }

  /// Whether slices are claimed by whoever runs, because ranks outnumber cores; else every rank
  /// owns some.
  bool claims() const { return claims_; }
  Patience patience() const {
    if (claims_) return Patience::shared_core();
    return remote_ ? Patience::beside_network() : Patience::own_core();
  }

  /// Null if all ranks are on this node. Set before the first collective.
  Remote* remote() const { return remote_; }
  void set_remote(Remote* remote) { remote_ = remote; }

  /// Publishes a failure for all ranks; the first one wins. Any thread. `culprit`, `detector`:
  /// numbers in the communicator.
  void abort(ErrorCode code, int culprit, const std::string& reason);
  void abort(const AbortRecord& record);
  /// The same, because this rank's user wants out of a wait.
  void abort_interrupted();
  bool aborted() const { return shared().abort_word.load(std::memory_order_acquire) != 0; }
  AbortRecord abort_record() const;

  /// Says goodbye: later waits of others for this rank fail at once. Does not wait. Idempotent.
  void depart();
  bool dead(int rank) const;
  /// "rank 3 (pid 4711)"; with the host if there are several.
  std::string describe(int rank) const;

  void mark_reported() { own().reported.store(1, std::memory_order_release); }
  /// A rank that died.
  std::optional<AbortRecord> find_dead() const;
  /// A rank that died, or that departed before it came to collective `sequence`.
  std::optional<AbortRecord> find_lost(uint64_t sequence) const;
  /// Of those that have not come to collective `sequence`: who they are, what each did last, and
  /// whether it is stopped. Empty if all have come.
  std::string missing(uint64_t sequence) const;

  /// Whether every rank that still lives has told its user of the abort.
  bool all_reported() const;

 private:
  int rank_, size_;
  std::vector<int> numbers_;
  bool in_process_, claims_;
  int pid_;
  std::atomic<bool> departed_{false};
  Remote* remote_ = nullptr;
  std::string host_;  // empty if the communicator is on one
  Segment segment_;
  // Places in the segment: every wait looks there.
  std::vector<RankControl*> controls_;
  RankControl* own_;
  GroupControl* shared_;
};

/// The record of a timeout, as this rank detects it.
AbortRecord timed_out(const Group& group, double after_s, const std::string& why);

/// What a rank's waits look at during one collective.
class GroupWatch : public Watch {
 public:
  struct Limits {
    double warn_after_s, end_after_s;
  };
  /// `interrupted` is asked about every 50 ms whether the user wants out; empty on progress
  /// threads. Costs nothing until a wait is long: the clock starts with the first stop().
  GroupWatch(Group& group, const Header& header, Limits limits,
             const std::function<bool()>& interrupted, const std::atomic<bool>& closing)
      : group_(group),
        header_(header),
        limits_(limits),
        interrupted_(interrupted),
        closing_(closing) {}

  bool stop() override;

 private:
  bool check_user(int64_t now);
  void check_time(int64_t now);
  std::string why_long(const std::string& missing) const;

  Group& group_;
  const Header& header_;
  const Limits limits_;
  const std::function<bool()>& interrupted_;
  const std::atomic<bool>& closing_;
  int64_t begin_ns_ = 0, next_interrupt_ns_ = 0;
  bool warned_ = false, asked_ = false;
};

}  // namespace ringreduce
