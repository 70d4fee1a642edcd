// Virtual ranks as fibers: one stack and one clock per rank, all in the calling thread. A rank runs
// until it waits or yields, and the seed decides who runs next; so a run can be repeated exactly, a
// deadlock is seen at once, and any order of events that real ranks might produce can be tried.
// Knows nothing of messages.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace ringreduce::sim {

/// A small generator of random numbers (splitmix64), the same on every platform.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next();
  uint64_t below(uint64_t bound) { return next() % bound; }
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }  // in [0, 1)

 private:
  uint64_t state_;
};

/// Who runs when several ranks can.
enum class Order {
  by_time,  // the rank whose clock is behind all others': in the order of virtual time
  random,   // any, often the same for long: orders that are rare in real life, but possible
};

class Fibers {
 public:
  Fibers(int count, Order order, uint64_t seed);

  /// Runs body(0) ... body(count - 1) until all have returned. What a body throws is thrown here.
  void run(const std::function<void(int rank)>& body);

  /// Empty if all went well. Otherwise the first failure; a deadlock names who waits for what.
  const std::string& failure() const { return failure_; }
  bool stopped() const { return !failure_.empty(); }

  // The following are for the rank that runs.

  int rank() const { return running_; }
  double& clock() { return fibers_[static_cast<size_t>(running_)].clock; }
  double clock_of(int rank) const { return fibers_[static_cast<size_t>(rank)].clock; }

  /// Others may run before this rank goes on.
  void yield();
  /// Until ready(). False: everything has stopped. `describe` says what for, if nobody will ever
  /// provide it.
  bool wait(std::function<bool()> ready, std::function<std::string()> describe);
  /// The same, for what changes only when somebody calls wake(rank): nobody asks before, which
  /// makes many ranks affordable.
  bool sleep(std::function<bool()> ready, std::function<std::string()> describe);
  void wake(int rank) { fibers_[static_cast<size_t>(rank)].asleep = false; }
  /// Stops all ranks: every wait returns false from now on, also those under way.
  void fail(const std::string& reason);

 private:
  struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack;
    std::function<bool()> ready;  // empty: can run
    std::function<std::string()> describe;
    double clock = 0;
    bool sleeps = false;  // asks for `ready` after wake only
    bool asleep = false;  // and nobody has called it since
    bool finished = false;
  };

  static void enter();
  bool can_run(int rank);
  int choose();
  std::string deadlock() const;
  void hand_over();

  Order order_;
  Random random_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_{};
  const std::function<void(int)>* body_ = nullptr;
  int num_finished_ = 0;
  int running_ = -1;  // stays on the rank that ran last while the scheduler chooses
  std::string failure_;
  std::exception_ptr thrown_;
};

}  // namespace ringreduce::sim
