#include "comm/work.h"

namespace ringreduce {
namespace {

class WorkWatch : public Watch {
 public:
  WorkWatch(Deadline deadline, const Interrupted& interrupted)
      : deadline_(deadline), interrupted_(interrupted), next_interrupt_ns_(now_ns() + period_ns) {}

  bool stop() override {
    const int64_t now = now_ns();
    if (now >= next_interrupt_ns_) {
      next_interrupt_ns_ = now + period_ns;
      was_interrupted = was_interrupted || (interrupted_ && interrupted_());
    }
    return was_interrupted || deadline_.passed(now);
  }

  bool was_interrupted = false;

 private:
  static constexpr int64_t period_ns = 50'000'000;
  Deadline deadline_;
  const Interrupted& interrupted_;
  int64_t next_interrupt_ns_;
};

}  // namespace

Work::Outcome Work::wait(Deadline deadline, const Interrupted& interrupted) {
  WorkWatch watch(deadline, interrupted);
  // The progress thread may want this core.
  if (ringreduce::wait(finished_, 1, Patience::shared_core(), watch)) return Outcome::finished;
  return watch.was_interrupted ? Outcome::interrupted : Outcome::timed_out;
}

void Work::get() {
  seen_.store(true);
  if (error_) std::rethrow_exception(error_);
}

void Work::finish(std::exception_ptr error) {
  error_ = std::move(error);
  finished_.publish(1);
}

}  // namespace ringreduce
