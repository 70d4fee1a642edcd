#include "shm/life.h"

#include <linux/futex.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <string>

#include "base/error.h"
#include "base/thread.h"

namespace ringreduce {
namespace {

/// Robust mutexes belong to a thread, so one thread locks and unlocks all of them, for any caller.
/// It never ends by itself: it must outlive everything in the process that communicates.
class LifeThread {
 public:
  LifeThread() {
    start_thread([this] { run(); });
  }

  int call(int (*action)(pthread_mutex_t*), pthread_mutex_t* mutex) {
    std::lock_guard one_at_a_time(callers_);
    std::unique_lock lock(state_);
    action_ = action;
    mutex_ = mutex;
    changed_.notify_all();
    changed_.wait(lock, [this] { return action_ == nullptr; });
    return result_;
  }

 private:
  void run() {
    std::unique_lock lock(state_);
    for (;;) {
      changed_.wait(lock, [this] { return action_ != nullptr; });
      // Callers come one at a time, so nobody changes these meanwhile.
      lock.unlock();
      const int result = action_(mutex_);
      lock.lock();
      result_ = result;
      action_ = nullptr;
      changed_.notify_all();
    }
  }

  std::mutex callers_, state_;
  std::condition_variable changed_;
  int (*action_)(pthread_mutex_t*) = nullptr;
  pthread_mutex_t* mutex_ = nullptr;
  int result_ = 0;
};

/// Leaked on purpose: exit handlers must not destroy what the thread still uses. A forked child
/// gets a new one, since threads do not survive a fork.
LifeThread& life_thread() {
  static LifeThread* thread = nullptr;
  static pid_t owner = 0;
  static std::mutex creation;
  std::lock_guard lock(creation);
  if (thread == nullptr || owner != getpid()) {
    thread = new LifeThread;
    owner = getpid();
  }
  return *thread;
}

}  // namespace

void hold_for_life(pthread_mutex_t* mutex) {
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
  pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_mutex_init(mutex, &attributes);
  pthread_mutexattr_destroy(&attributes);
  const int result = life_thread().call(pthread_mutex_lock, mutex);
  if (result != 0) {
    throw Error(ErrorCode::resource, "cannot lock a robust mutex: error " + std::to_string(result));
  }
}

void release_life(pthread_mutex_t* mutex) { life_thread().call(pthread_mutex_unlock, mutex); }

bool died(const pthread_mutex_t* mutex) {
  // glibc keeps the futex word here; the kernel sets the mark in it. The thread that dies is never
  // this one, so an acquire load orders the reads of what the dead rank had published.
  return __atomic_load_n(&mutex->__data.__lock, __ATOMIC_ACQUIRE) & FUTEX_OWNER_DIED;
}

}  // namespace ringreduce
