#include "comm/engine.h"

#include "base/error.h"
#include "base/thread.h"

namespace ringreduce {
namespace {

thread_local bool is_progress_thread = false;

}  // namespace

bool Engine::on_progress_thread() { return is_progress_thread; }

Engine::Turn::Turn(Engine& engine) : engine_(engine) {
  std::lock_guard lock(engine_.mutex_);
  engine_.refuse_holder();
  if (engine_.stopped_) throw Error(ErrorCode::closed, "the communicator is closed");
  granted_ = !engine_.busy_ && engine_.queue_.empty();
  if (!granted_) return;
  engine_.busy_ = true;
  engine_.holder_ = std::this_thread::get_id();
}

Engine::Turn::~Turn() {
  if (!granted_) return;
  std::lock_guard lock(engine_.mutex_);
  engine_.holder_ = {};
  engine_.busy_ = false;
  if (!engine_.queue_.empty()) engine_.changed_.notify_all();
}

std::shared_ptr<Work> Engine::enqueue(Task task, bool asynchronous) {
  auto work = std::make_shared<Work>();
  std::lock_guard lock(mutex_);
  if (stopped_) throw Error(ErrorCode::closed, "the communicator is closed");
  if (!started_) {  // before the rest: where no thread can be had, nothing is left in the queue
    start_thread([self = shared_from_this()] { self->progress(); });
    started_ = true;
  }
  queue_.push_back({std::move(task), work, asynchronous});
  last_ = work;
  changed_.notify_all();
  return work;
}

void Engine::progress() {
  is_progress_thread = true;
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopped_ || (!busy_ && !queue_.empty()); });
    if (stopped_) break;
    Entry entry = std::move(queue_.front());
    queue_.pop_front();
    busy_ = true;
    lock.unlock();
    std::exception_ptr error;
    try {
      entry.task(*entry.work);
    } catch (...) {
      error = std::current_exception();
    }
    entry.task = nullptr;  // what it holds is released before anybody may count on it
    lock.lock();
    busy_ = false;
    finish(entry, error);  // last: whoever has waited for it may find the engine idle
  }
  for (Entry& entry : queue_) {
    finish(entry,
           std::make_exception_ptr(Error(
               ErrorCode::closed, "the communicator was closed before this operation began")));
  }
  queue_.clear();
}

void Engine::finish(Entry& entry, std::exception_ptr error) {
  if (error && entry.asynchronous) {
    unseen_.push_back(entry.work);
    any_unseen_.store(true, std::memory_order_relaxed);
  }
  entry.work->finish(std::move(error));
}

std::exception_ptr Engine::take_unseen_error() {
  if (!any_unseen_.load(std::memory_order_relaxed)) return nullptr;
  std::lock_guard lock(mutex_);
  while (!unseen_.empty()) {
    const std::shared_ptr<Work> work = unseen_.front();
    unseen_.pop_front();
    if (!work->seen()) return work->error();
  }
  any_unseen_.store(false, std::memory_order_relaxed);
  return nullptr;
}

void Engine::refuse_within_operation() {
  std::lock_guard lock(mutex_);
  refuse_holder();
}

void Engine::refuse_holder() const {
  if (holder_ != std::this_thread::get_id()) return;
  throw Error(ErrorCode::invalid,
              "a signal handler that runs within a collective cannot wait for another one of the "
              "same communicator: set a flag in the handler, and look at it between collectives");
}

bool Engine::idle() {
  std::lock_guard lock(mutex_);
  return !busy_ && queue_.empty();
}

bool Engine::drain(Deadline deadline, const Interrupted& interrupted) {
  std::shared_ptr<Work> last;
  {
    std::lock_guard lock(mutex_);
    last = last_.lock();
  }
  return !last || last->wait(deadline, interrupted) == Work::Outcome::finished;
}

void Engine::stop() {
  std::lock_guard lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
}

}  // namespace ringreduce
