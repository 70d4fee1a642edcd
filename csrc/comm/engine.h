// Runs a communicator's operations one after another, in the order in which they were issued: on
// the caller's thread if it waits anyway and nothing is under way, else on one progress thread,
// which is started when first needed and never touches Python.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

#include "comm/work.h"

namespace ringreduce {

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  /// What an operation does; throws on failure. On a user's thread it may ask `interrupted`; else
  /// it is empty.
  using Task = std::function<void(Work& work, const Interrupted& interrupted)>;

  /// Asynchronous: returns at once. Else returns a finished Work; a wait that is interrupted calls
  /// `give_up`, after which the operation must end soon.
  std::shared_ptr<Work> run(Task task, bool asynchronous, const Interrupted& interrupted,
                            const std::function<void()>& give_up);

  /// The error of an earlier operation that nobody waited for; each is returned once.
  std::exception_ptr take_unseen_error();

  bool idle();
  /// False if operations are still under way at the deadline.
  bool drain(Deadline deadline, const Interrupted& interrupted);
  /// No more operations; the progress thread ends after the one under way. Does not wait.
  void stop();

 private:
  struct Entry {
    Task task;
    std::shared_ptr<Work> work;
  };
  static void execute(const Task& task, Work& work, const Interrupted& interrupted);
  void progress();

  std::mutex mutex_;  // of everything below
  std::condition_variable changed_;
  std::deque<Entry> queue_;
  std::deque<std::shared_ptr<Work>>
      unseen_;  // asynchronous operations whose errors may go unnoticed
  std::shared_ptr<Work> last_;
  bool busy_ = false, started_ = false, stopped_ = false;
};

}  // namespace ringreduce
