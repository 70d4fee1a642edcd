#include "sim/fibers.h"

#include <exception>
#include <stdexcept>

namespace ringreduce::sim {
namespace {

// The kernels of reduce/ take less than 8 KB; a sanitizer, several times as much.
constexpr size_t stack_bytes = size_t{128} << 10;

// In random order: how often on average another rank than the last is tried.
constexpr uint64_t mean_run = 16;

// makecontext passes no pointer portably; this thread's scheduler leaves itself here before each
// switch.
thread_local Fibers* current = nullptr;

}  // namespace

uint64_t Random::next() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

Fibers::Fibers(int count, Order order, uint64_t seed)
    : order_(order), random_(seed), fibers_(static_cast<size_t>(count)) {}

void Fibers::enter() {
  Fibers& self = *current;
  Fiber& fiber = self.fibers_[static_cast<size_t>(self.running_)];
  try {
    (*self.body_)(self.running_);
  } catch (...) {
    if (!self.thrown_) self.thrown_ = std::current_exception();
    self.fail("rank " + std::to_string(self.running_) + " threw an exception");
  }
  fiber.finished = true;
  ++self.num_finished_;
}

void Fibers::run(const std::function<void(int)>& body) {
  body_ = &body;
  for (Fiber& fiber : fibers_) {
    // Not make_unique, which would write, and so occupy, all of it.
    fiber.stack.reset(new char[stack_bytes]);
    if (getcontext(&fiber.context) != 0) throw std::runtime_error("getcontext failed");
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Fibers::enter, 0);
    fiber.finished = false;
  }
  while ((running_ = choose()) != -1) {
    current = this;
    swapcontext(&scheduler_, &fibers_[static_cast<size_t>(running_)].context);
  }
  for (Fiber& fiber : fibers_) fiber.stack.reset();
  if (thrown_) std::rethrow_exception(thrown_);
}

/// After a stop everybody runs on to the end, past all waits: stacks are unwound the ordinary way.
bool Fibers::can_run(int rank) {
  Fiber& fiber = fibers_[static_cast<size_t>(rank)];
  if (fiber.finished) return false;
  if (stopped() || !fiber.ready) return true;
  if (fiber.asleep) return false;
  const bool ready = fiber.ready();
  fiber.asleep = fiber.sleeps && !ready;
  return ready;
}

/// -1: all have finished.
int Fibers::choose() {
  const int size = static_cast<int>(fibers_.size());
  const bool same_again = running_ != -1 && random_.below(mean_run) != 0;
  int chosen = -1;
  if (order_ == Order::random && same_again && can_run(running_)) return running_;
  const int first = order_ == Order::random ? static_cast<int>(random_.below(fibers_.size())) : 0;
  for (int i = 0; i < size; ++i) {
    const int rank = (first + i) % size;
    if (chosen != -1 && (order_ == Order::random || clock_of(rank) >= clock_of(chosen))) continue;
    if (can_run(rank)) chosen = rank;
  }
  if (chosen == -1 && num_finished_ < size) {
    fail(deadlock());
    return choose();
  }
  return chosen;
}

std::string Fibers::deadlock() const {
  std::string text = "deadlock:";
  for (size_t rank = 0; rank < fibers_.size(); ++rank) {
    text += "\n  rank " + std::to_string(rank);
    text += fibers_[rank].finished ? " has finished" : " waits for " + fibers_[rank].describe();
  }
  return text;
}

/// On to whoever runs next; straight there, as switches are what takes the time of a simulation.
void Fibers::hand_over() {
  Fiber& self = fibers_[static_cast<size_t>(running_)];
  const int next = choose();
  if (next != running_) {
    running_ = next;
    swapcontext(&self.context, &fibers_[static_cast<size_t>(next)].context);
  }
  self.ready = nullptr;
}

void Fibers::yield() {
  if (!stopped()) hand_over();
}

bool Fibers::wait(std::function<bool()> ready, std::function<std::string()> describe) {
  if (stopped() || ready()) return !stopped();
  Fiber& fiber = fibers_[static_cast<size_t>(running_)];
  fiber.ready = std::move(ready);
  fiber.describe = std::move(describe);
  hand_over();
  return !stopped();
}

bool Fibers::sleep(std::function<bool()> ready, std::function<std::string()> describe) {
  Fiber& fiber = fibers_[static_cast<size_t>(running_)];
  fiber.sleeps = true;
  const bool met = wait(std::move(ready), std::move(describe));
  fiber.sleeps = fiber.asleep = false;
  return met;
}

void Fibers::fail(const std::string& reason) {
  if (!stopped()) failure_ = reason;
}

}  // namespace ringreduce::sim
