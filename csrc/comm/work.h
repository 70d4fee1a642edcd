// The handle of an operation: finished or not, its error, and an allgather's output. Written by the
// thread that runs the operation before it publishes `finished`; read by others after that.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "base/deadline.h"
#include "cuda/gpu.h"
#include "shm/wait.h"

namespace ringreduce {

/// Asked now and then by waits on a user's thread: true if a signal handler wants to raise.
using Interrupted = std::function<bool()>;

class Work {
 public:
  bool done() const { return finished_.reached(1); }

  enum class Outcome { finished, timed_out, interrupted };
  /// Waits for the end of the operation, at most until `deadline`; may be called again.
  Outcome wait(Deadline deadline, const Interrupted& interrupted);

  /// After it is done: throws its error, if any, now and whenever it is asked again.
  void get();
  bool failed() const { return error_ != nullptr; }
  std::exception_ptr error() const { return error_; }
  /// Whether somebody was told of the error.
  bool seen() const { return seen_.load(); }

  void finish(std::exception_ptr error);

  // An allgather's result: rows per rank, and the elements of all of them.
  std::vector<size_t> counts;
  std::shared_ptr<char[]> output;
  size_t output_bytes = 0;

  // On a GPU: when the device has ended it. Null if there is nothing to wait for.
  std::shared_ptr<cuda::Event> event;

  // When the collective began and ended on this rank (now_ns()).
  int64_t begin_ns = 0, end_ns = 0;

 private:
  Flag finished_;
  std::exception_ptr error_;
  std::atomic<bool> seen_{false};
};

}  // namespace ringreduce
