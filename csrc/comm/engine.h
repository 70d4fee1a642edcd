// Runs a communicator's operations one after another, in the order in which they were issued: on
// the caller's thread if it waits anyway and nothing is under way, else on one progress thread,
// which is started when first needed and never touches Python.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "comm/work.h"

namespace ringreduce {

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  /// What an operation does; throws on failure.
  using Task = std::function<void(Work& work)>;

  /// Queues an operation for the progress thread. Its error, unless somebody looks at it, is kept
  /// for take_unseen_error if `asynchronous`.
  std::shared_ptr<Work> enqueue(Task task, bool asynchronous);

  /// The right to run an operation on this thread, now. Nobody has it while others are under way.
  class Turn {
   public:
    /// Throws if this thread has it already: it is in a signal handler, and would wait for itself.
    explicit Turn(Engine& engine);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    bool granted() const { return granted_; }

   private:
    Engine& engine_;
    bool granted_ = false;
  };

  /// Whether the caller is a progress thread, of any engine.
  static bool on_progress_thread();

  /// The error of an earlier operation that nobody waited for; each is returned once.
  std::exception_ptr take_unseen_error();

  /// Throws if this thread is within an operation that it runs itself, as its signal handlers are.
  void refuse_within_operation();

  bool idle();
  /// False if operations are still under way at the deadline.
  bool drain(Deadline deadline, const Interrupted& interrupted);
  /// No more operations; the progress thread ends after the one under way. Does not wait.
  void stop();

 private:
  struct Entry {
    Task task;
    std::shared_ptr<Work> work;
    bool asynchronous;
  };
  void progress();
  // The mutex is held in these.
  void finish(Entry& entry, std::exception_ptr error);
  void refuse_holder() const;

  std::mutex mutex_;  // of everything below
  std::condition_variable changed_;
  std::deque<Entry> queue_;
  // Asynchronous operations that have failed, whose errors may go unnoticed.
  std::deque<std::shared_ptr<Work>> unseen_;
  // Whether unseen_ has any; written under the mutex. Read without it, so that a call with nothing
  // to hear of pays for no lock: what fails meanwhile is heard of in a later call.
  std::atomic<bool> any_unseen_{false};
  std::weak_ptr<Work> last_;  // gone: it has ended, and nobody wants its result
  std::thread::id holder_;    // who has a Turn; of no thread if nobody has
  bool busy_ = false, started_ = false, stopped_ = false;
};

}  // namespace ringreduce
