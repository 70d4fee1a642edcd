// Every way for a Communicator to fail, met on purpose: all ranks must be told the same, in time,
// and no rank that did its part may take alarm.
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "elements.h"
#include "shm/segment.h"
#include "shm/socket.h"

namespace {
int num_signals = 0;  // to come, each while memory is allocated
}

/// In place of the C library's: a kernel that gives up when a signal comes.
extern "C" int posix_fallocate(int fd, off_t offset, off_t length) {
  if (num_signals > 0 && num_signals-- % 3 != 0) return EINTR;
  return fallocate(fd, 0, offset, length) == 0 ? 0 : errno;
}

namespace ringreduce {
namespace {

/// Each rank in turn differs in each word of its call; all are told, and can go on.
void mismatches(Rank& self) {
  std::vector<float> x(64, 1.0f), y(64);
  for (int odd = 0; odd < self.size; ++odd) {
    const bool mine = self.rank == odd;
    const Call calls[] = {
        call_of(Kind::allreduce, x.data(), y.data(), {64}, mine ? Op::max : Op::sum),
        call_of(Kind::allreduce, x.data(), y.data(), {mine ? 63 : 64}),
        call_of(Kind::broadcast, y.data(), y.data(), {64}, Op::sum, mine ? 1 : 0),
        call_of(mine ? Kind::reduce_scatter : Kind::broadcast, y.data(), y.data(), {64}),
        mine ? Call{} : call_of(Kind::allreduce, x.data(), y.data(), {8, 8}),
    };
    for (const Call& call : calls) {
      const std::string text = error_of(ErrorCode::mismatch, [&] { self.run(call); });
      require_in("rank " + std::to_string(odd) + " calls ", text);
    }
    x = input_of<float>(self.rank, 64, odd);
    self.run(call_of(Kind::allreduce, x.data(), y.data(), {64}));
    require_equal(y.data(), reduced<float>(Op::sum, self.size, 64, odd), "after a mismatch");
  }
}

/// One rank gives up while the others are at work; every one is told who and why.
void abort_at_work(Rank& self, int culprit, bool overlapping) {
  std::vector<float> x(20'000, 1.0f);
  const int calls = 1 + culprit * 7 % 5;
  for (int call = 0; self.rank != culprit || call < calls; ++call) {
    Call next = call_of(Kind::allreduce, x.data(), x.data(), {length(x.size())});
    if (self.rank == culprit) {
      self.run(std::move(next));
      continue;
    }
    const std::string text = [&] {
      try {
        if (overlapping) {
          self.finish(*self.start(std::move(next)));
        } else {
          self.run(std::move(next));
        }
      } catch (const Error& error) {
        require(error.code() == ErrorCode::peer_failed, error.what());
        return std::string(error.what());
      }
      return std::string();
    }();
    if (text.empty()) continue;
    require_in("rank " + std::to_string(culprit) + " lost its way", text);
    return;
  }
  self.dawdle();
  self.comm->abort("rank " + std::to_string(culprit) + " lost its way");
}

/// What is still queued when a rank gives up fails as well, and in the same way.
void queued(Rank& self) {
  std::vector<std::shared_ptr<Work>> works;
  for (int index = 0; self.rank > 0 && index < 4; ++index) works.push_back(self.start(Call{}));
  self.exchange("queued");
  if (self.rank == 0) self.comm->abort("gave up");
  for (const auto& work : works) {
    require_in("gave up", error_of(ErrorCode::peer_failed, [&] { self.finish(*work); }));
  }
}

/// Ranks leave when they have done their part, at different times: nobody may take alarm.
void departures(Rank& self) {
  std::vector<float> x = input_of<float>(self.rank, 2'000, 1);
  for (int call = 0; call < 3; ++call) {
    self.run(call_of(Kind::allreduce, x.data(), x.data(), {length(x.size())}, Op::max));
  }
  self.dawdle();
  self.comm->close();
}

/// One rank leaves before its time.
void early_exit(Rank& self) {
  self.barrier();
  if (self.rank == self.size - 1) {
    self.comm->close();
    error_of(ErrorCode::closed, [&] { self.barrier(); });
    return;
  }
  const std::string text = error_of(ErrorCode::peer_failed, [&] { self.barrier(); });
  require_in("rank " + std::to_string(self.size - 1), text);
  require_in("exited", text);
}

void late_rank(Rank& self) {
  self.barrier();
  if (self.rank == 0) {
    while (!self.comm->core().group.aborted()) std::this_thread::yield();
    error_of(ErrorCode::timeout, [&] { self.barrier(); });
    return;
  }
  require_in("has not come", error_of(ErrorCode::timeout, [&] { self.barrier(); }));
}

/// Ctrl-C on one rank, in a blocking call or while it waits for an asynchronous one.
void interrupted(Rank& self, bool overlapping) {
  self.barrier();
  if (self.rank != 0) {
    const std::string text = error_of(ErrorCode::peer_failed, [&] {
      if (self.rank > 1) self.barrier();
      while (true) {  // rank 1 comes too late to all that rank 0 waits for
        if (self.comm->core().group.aborted()) self.barrier();
        std::this_thread::yield();
      }
    });
    require_in("rank 0 was interrupted", text);
    return;
  }
  int asked = 0;
  const Interrupted ask = [&asked] { return ++asked == 2; };
  error_of(ErrorCode::interrupted, [&] {
    if (!overlapping) self.run(Call{}, ask);
    self.comm->wait(*self.start(Call{}), Deadline::never(), ask);
  });
}

/// The own timeout of a wait ends the wait, not the operation; an error that nobody saw comes
/// later.
void patience(Rank& self) {
  if (self.rank == 0) {
    const auto work = self.start(Call{});
    require(!self.comm->wait(*work, Deadline::after_s(0.02), {}), "the wait did not end in time");
    self.exchange("come");
    self.finish(*work);
    const auto unseen = self.start(Call{});
    self.exchange("give up");
    while (!unseen->done()) std::this_thread::yield();
    require_in("gave up", error_of(ErrorCode::peer_failed, [&] { self.barrier(); }));
    return;
  }
  self.exchange("come");
  self.barrier();
  self.exchange("give up");
  self.comm->abort("gave up");
}

void memory_despite_signals() {
  const size_t size_bytes = 10'000'000;
  num_signals = 31;
  const int fd = create_memfd(size_bytes);
  require(num_signals < 31, "no signal has come");
  num_signals = 0;
  map_memfd(fd, size_bytes)->data()[size_bytes - 1] = 'x';
  close(fd);
}

/// No file descriptor from this one on, for a while.
class NoFiles {
 public:
  explicit NoFiles(int first) {
    getrlimit(RLIMIT_NOFILE, &before_);
    const rlimit none{static_cast<rlim_t>(first), before_.rlim_max};
    setrlimit(RLIMIT_NOFILE, &none);
  }
  ~NoFiles() { setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
};

/// A leader that has no file descriptor left for a peer says so, at once.
void no_file_for_a_peer() {
  const std::string name = random_name();
  const int listener = listen_on(name, 1), peer = connect_to(name, Deadline::after_s(1));
  const std::string text = error_of(ErrorCode::resource, [&] {
    const NoFiles none(std::max(listener, peer) + 1);
    accept_from(listener, Deadline::after_s(1));
  });
  require_in("cannot accept", text);
  close(listener);
  close(peer);
}

void run_all(int size) {
  announce("mismatches", size);
  run_ranks(size, {}, mismatches);
  announce("aborts and departures", size);
  for (int repetition = 0; repetition < 20; ++repetition) {
    const int culprit = repetition % size;
    const bool overlapping = repetition % 3 == 0;
    run_ranks(size, {}, [&](Rank& self) { abort_at_work(self, culprit, overlapping); });
    run_ranks(size, {}, departures);
  }
  announce("queued operations", size);
  run_ranks(size, {}, queued);
  announce("an early exit", size);
  run_ranks(size, {}, early_exit);
  announce("a late rank", size);
  run_ranks(size, {.timeout_s = 0.2}, late_rank);
  announce("interrupts", size);
  run_ranks(size, {}, [](Rank& self) { interrupted(self, false); });
  run_ranks(size, {}, [](Rank& self) { interrupted(self, true); });
  announce("patience", size);
  run_ranks(size, {}, patience);
}

}  // namespace
}  // namespace ringreduce

int main() {
  alarm(ringreduce::limit_s);
  ringreduce::pin_to_two_cores();
  ringreduce::memory_despite_signals();
  ringreduce::no_file_for_a_peer();
  for (const int size : {2, 3, 4, 7}) ringreduce::run_all(size);
}
