// What a rank's collectives did and when: records for a timeline. One Trace serves all
// communicators of a rank; it is off unless a timeline is being recorded. It writes no file and
// knows no clock but this process's.
//
// Off, a collective pays one relaxed load. On, it pays a lock and an append: callers and progress
// threads of several communicators write, so the lock, not the order of operations, makes it safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/error.h"
#include "base/header.h"
#include "base/op.h"
#include "comm/tuner.h"

namespace ringreduce {

/// One collective on this rank. Times are of now_ns().
struct TraceRecord {
  std::shared_ptr<const std::string> communicator;  // its name, which may outlive it here
  uint64_t sequence = 0;
  Kind kind = Kind::barrier;
  Op op = Op::sum;
  Dtype dtype = Dtype::f32;
  Algorithm algorithm = Algorithm::automatic;
  bool on_progress_thread = false;
  uint64_t bytes = 0;  // of this rank's inputs
  int64_t begin_ns = 0;
  int64_t met_ns = 0;  // all ranks had come; 0: they never did
  int64_t end_ns = 0;
  ErrorCode error = ErrorCode::none;
};

class Trace {
 public:
  static constexpr size_t largest_size = size_t{1} << 20;  // about 100 MB; the rest is counted only

  struct Taken {
    std::vector<TraceRecord> records;
    uint64_t dropped = 0;
  };

  bool on() const { return on_.load(std::memory_order_relaxed); }
  void start();
  /// No more records, and those since start().
  Taken stop();

  /// Any thread. Ignored where stop() came first.
  void add(TraceRecord record);

 private:
  std::atomic<bool> on_{false};  // written under the lock; a reader outside may be late, no more
  std::mutex mutex_;             // of what follows
  Taken taken_;
};

}  // namespace ringreduce
