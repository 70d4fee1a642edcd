// Ranks as threads of a test program, each with a Communicator of its own and with random delays
// between its calls. The first thing that is wrong ends the program.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "base/error.h"
#include "comm/communicator.h"
#include "fake_mpi.h"

namespace ringreduce {

inline constexpr unsigned limit_s = 500;  // the whole program; a hang ends it by SIGALRM

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::_Exit(1);
}

inline void require(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

/// An allgather of small messages among threads.
class ThreadExchange {
 public:
  explicit ThreadExchange(int size) : size_(static_cast<size_t>(size)) {}

  std::vector<std::string> operator()(size_t rank, size_t round, const std::string& message) {
    std::unique_lock lock(mutex_);
    std::map<size_t, std::string>& messages = rounds_[round];
    messages[rank] = message;
    changed_.notify_all();
    changed_.wait(lock, [&] { return messages.size() == size_; });
    std::vector<std::string> all;
    for (const auto& [sender, each] : messages) all.push_back(each);
    return all;
  }

 private:
  size_t size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<size_t, std::map<size_t, std::string>> rounds_;
};

/// What a rank's thread works with.
struct Rank {
  int rank, size;
  Exchange exchange;
  Options options;
  OpenNetwork open_network;
  std::mt19937 random;
  std::unique_ptr<Communicator> comm;
  FakeNetwork* network = nullptr;  // across hosts

  int below(int limit) { return static_cast<int>(random() % static_cast<unsigned>(limit)); }
  bool chance(int in) { return below(in) == 0; }
  void dawdle() {
    if (chance(4)) std::this_thread::sleep_for(std::chrono::microseconds(below(300)));
  }
  /// Collective.
  std::unique_ptr<Communicator> open() {
    return std::make_unique<Communicator>(rank, size, exchange, options, open_network);
  }
  std::shared_ptr<Work> start(Call call) {
    dawdle();
    return comm->start(std::move(call));
  }
  std::shared_ptr<Work> run(const Call& call, const Interrupted& interrupted = {}) {
    dawdle();
    auto work = std::make_shared<Work>();
    comm->run(call, *work, interrupted);
    work->finish(nullptr);
    return work;
  }
  void barrier() { run(Call{}); }
  void finish(Work& work) { comm->wait(work, Deadline::never(), {}); }
};

/// `hosts`: on which of several pretended hosts each rank is; empty: all on one. `is_on_device`:
/// given, the MPI between them takes the memory of which this is true.
inline void run_ranks(int size, Options options, const std::function<void(Rank&)>& body,
                      const std::vector<std::string>& hosts = {},
                      bool (*is_on_device)(const void*) = nullptr) {
  static unsigned runs = 0;  // seeds: every run has its own delays, the same in every execution
  ++runs;
  options.in_process = true;
  ThreadExchange exchange(size);
  FakeNetwork network({.seed = runs, .max_delay_tests = 5, .is_on_device = is_on_device});
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank, seed = runs * 100] {
      auto round = std::make_shared<size_t>(0);
      const auto number = static_cast<size_t>(rank);
      Rank self{rank, size, {}, options, {}, std::mt19937(seed + static_cast<unsigned>(rank)), {}};
      if (!hosts.empty()) self.options.host = hosts[number];
      self.network = &network;
      self.open_network = [&network, rank] { return Network{network.rank(rank), rank}; };
      self.exchange = [&exchange, round, number](const std::string& message) {
        return exchange(number, (*round)++, message);
      };
      try {
        self.comm = self.open();
        body(self);
      } catch (const std::exception& error) {
        fail("rank " + std::to_string(rank) + " of " + std::to_string(size) + ": " + error.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

/// The message of the Error that `action` throws; anything else than an error of this code fails.
template <class Action>
std::string error_of(ErrorCode code, Action action) {
  try {
    action();
  } catch (const Error& error) {
    require(error.code() == code, std::string("another error than expected: ") + error.what());
    return error.what();
  }
  fail("no error where one was expected");
}

inline void require_in(const std::string& part, const std::string& text) {
  require(text.find(part) != std::string::npos, "'" + part + "' is not in: " + text);
}

/// The first two cores of this process's: there two ranks own slices, and more ranks claim them.
inline void pin_to_two_cores() {
  cpu_set_t mine, two;
  CPU_ZERO(&two);
  sched_getaffinity(0, sizeof(mine), &mine);
  for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&two) < 2; ++cpu) {
    if (CPU_ISSET(cpu, &mine)) CPU_SET(cpu, &two);
  }
  sched_setaffinity(0, sizeof(two), &two);
}

/// Before a hang, the last line says in what.
inline void announce(const char* what, int size) {
  std::printf("%s, %d ranks\n", what, size);
  std::fflush(stdout);
}

}  // namespace ringreduce
