// The ranks of a node as members of one communicator: their control memory, who is alive, and the
// abort that ends a communicator for all of them. Ranks are numbered within the group here.
#pragma once

#include <atomic>
#include <functional>
#include <string>

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

class Group {
 public:
  /// Collective. Maps the control segment and proves by a nonce that the memory is shared.
  Group(Node& node, bool in_process, Deadline deadline);
  ~Group();

  int rank() const { return rank_; }
  int size() const { return size_; }
  RankControl& control(int rank) const;
  RankControl& own() const { return control(rank_); }
  GroupControl& shared() const;

  /// Whether slices are claimed by whoever runs, because ranks outnumber cores; else every rank
  /// owns some.
  bool claims() const { return claims_; }
  Patience patience() const { return claims_ ? Patience::shared_core() : Patience::own_core(); }

  /// Publishes a failure for all ranks; the first one wins. Any thread.
  void abort(ErrorCode code, int culprit, const std::string& reason);
  bool aborted() const { return shared().abort_word.load(std::memory_order_acquire) != 0; }
  AbortRecord abort_record() const;

  /// Says goodbye: later waits of others for this rank fail at once. Does not wait. Idempotent.
  void depart();
  bool dead(int rank) const;

  void mark_reported() { own().reported.store(1, std::memory_order_release); }
  /// Whether every rank that still lives has told its user of the abort.
  bool all_reported() const;

 private:
  int rank_, size_;
  bool in_process_, claims_;
  int pid_;
  std::atomic<bool> departed_{false};
  Segment segment_;
};

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
  bool check_peers();
  bool check_user(int64_t now);
  void check_time(int64_t now);
  std::string missing() const;

  Group& group_;
  const Header& header_;
  const Limits limits_;
  const std::function<bool()>& interrupted_;
  const std::atomic<bool>& closing_;
  int64_t begin_ns_ = 0, next_interrupt_ns_ = 0;
  bool warned_ = false;
};

}  // namespace ringreduce
