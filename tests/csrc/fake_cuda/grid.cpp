#include "grid.h"

#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>

#include <cstring>
#include <memory>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

// The fibers of a grid synchronise where kernels say so, not because they happen to run in one
// thread: ThreadSanitizer is told of switches without order, and does not look into the scheduler.
#define RR_UNSEEN __attribute__((no_sanitize("thread"), noinline))

namespace fake_cuda {

thread_local Place place;

namespace {

constexpr size_t stack_bytes = size_t{256} << 10;

struct Block {
  unsigned arrived = 0, live = 0;
  uint64_t meetings = 0;
  bool any = false, result = false;
  const char* file = nullptr;
  int line = 0;
};

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* sanitizer = nullptr;
  Place place;
  Block* block = nullptr;
  uint64_t waits_past = 0;  // runs once its block has had more meetings than this
  bool at_meeting = false, finished = true;
};

/// One thread's fibers, kept from one kernel to the next.
struct Scheduler {
  Fiber** fibers = nullptr;
  size_t count = 0, capacity = 0, running = 0, live = 0, idle = 0;
  Block* blocks = nullptr;
  ucontext_t main;
  void* main_sanitizer = nullptr;
  const std::function<void()>* body = nullptr;
  uint64_t random = 88172645463325252;

  ~Scheduler() {
    for (size_t i = 0; i < capacity; ++i) {
#ifdef __SANITIZE_THREAD__
      __tsan_destroy_fiber(fibers[i]->sanitizer);
#endif
#ifdef __SANITIZE_ADDRESS__
      // What comes to lie there next is no stack.
      __asan_unpoison_memory_region(fibers[i]->stack, stack_bytes);
#endif
      munmap(fibers[i]->stack, stack_bytes);
      delete fibers[i];
    }
    delete[] fibers;
  }
};

thread_local Scheduler scheduler;

RR_UNSEEN void hand_sanitizer(void* to) {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to, __tsan_switch_to_fiber_no_sync);
#else
  (void)to;
#endif
}

void order_before(void* what) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(what);
#else
  (void)what;
#endif
}

void order_after(void* what) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(what);
#else
  (void)what;
#endif
}

RR_UNSEEN bool can_run(const Fiber& fiber) {
  return !fiber.finished && (!fiber.at_meeting || fiber.block->meetings > fiber.waits_past);
}

/// The next fiber that can run, by turns. One can: the last to come to a meeting does not wait.
RR_UNSEEN size_t choose(const Scheduler& all) {
  size_t next = all.running;
  for (size_t tried = 0; tried <= all.count; ++tried) {
    next = next + 1 == all.count ? 0 : next + 1;
    if (can_run(*all.fibers[next])) return next;
  }
  fail("all threads of a kernel wait for each other");
}

RR_UNSEEN void switch_to_next() {
  Scheduler& all = scheduler;
  Fiber& self = *all.fibers[all.running];
  const size_t next = choose(all);
  if (next == all.running) return;
  all.running = next;
  Fiber& other = *all.fibers[next];
  place = other.place;
  hand_sanitizer(other.sanitizer);
  swapcontext(&self.context, &other.context);
}

RR_UNSEEN void finish_fiber() {
  Scheduler& all = scheduler;
  Fiber& self = *all.fibers[all.running];
  self.finished = true;
  all.idle = 0;
  Block& block = *self.block;
  if (block.arrived > 0) fail("a thread has left its kernel while others of its block meet");
  --block.live;
  if (--all.live == 0) {
    hand_sanitizer(all.main_sanitizer);
    setcontext(&all.main);
  }
  const size_t next = choose(all);
  all.running = next;
  place = all.fibers[next]->place;
  hand_sanitizer(all.fibers[next]->sanitizer);
  setcontext(&all.fibers[next]->context);
}

void enter() {
  order_after(&scheduler.main);
  (*scheduler.body)();
  order_before(&scheduler.main);
  finish_fiber();
}

RR_UNSEEN void start_fiber(Fiber& fiber) {
  if (!fiber.stack) {
    fiber.stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.stack == MAP_FAILED) fail("no memory for a kernel's threads");
#ifdef __SANITIZE_THREAD__
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  fiber.at_meeting = fiber.finished = false;
}

RR_UNSEEN void switch_to_first() {
  Fiber& first = *scheduler.fibers[0];
  place = first.place;
  hand_sanitizer(first.sanitizer);
  swapcontext(&scheduler.main, &first.context);
}

}  // namespace

void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  Scheduler& all = scheduler;
  all.count = all.live = size_t{blocks} * threads;
  if (all.count > all.capacity) {
    auto** grown = new Fiber*[all.count];
    for (size_t i = 0; i < all.count; ++i) {
      grown[i] = i < all.capacity ? all.fibers[i] : new Fiber;
    }
    delete[] all.fibers;
    all.fibers = grown;
    all.capacity = all.count;
  }
  const std::unique_ptr<Block[]> states(new Block[blocks]);
  for (size_t i = 0; i < all.count; ++i) {
    const auto block = static_cast<unsigned>(i) / threads,
               thread = static_cast<unsigned>(i) % threads;
    Fiber& fiber = *all.fibers[i];
    start_fiber(fiber);
    fiber.block = &states[block];
    fiber.place = {dim3(thread), dim3(block), dim3(threads), dim3(blocks)};
    ++states[block].live;
  }
  all.body = &body;
  all.running = 0;
  all.idle = 0;
#ifdef __SANITIZE_THREAD__
  all.main_sanitizer = __tsan_get_current_fiber();
#endif
  order_before(&all.main);
  switch_to_first();
  order_after(&all.main);
}

RR_UNSEEN static bool arrive(bool value, const char* file, int line) {
  Scheduler& all = scheduler;
  Fiber& self = *all.fibers[all.running];
  Block& block = *self.block;
  if (block.arrived == 0) {
    block.file = file;
    block.line = line;
    block.any = false;
  } else if (block.line != line || std::strcmp(block.file, file) != 0) {
    fail("threads of a block meet at different places: " + std::string(block.file) + ":" +
         std::to_string(block.line) + " and " + file + ":" + std::to_string(line));
  }
  block.any |= value;
  all.idle = 0;
  if (++block.arrived == place.threads.x) {
    block.result = block.any;
    block.arrived = 0;
    ++block.meetings;
  } else {
    if (block.live != place.threads.x) fail("a thread has left its kernel before others meet");
    self.waits_past = block.meetings;
    self.at_meeting = true;
    switch_to_next();
    self.at_meeting = false;
  }
  return block.result;
}

RR_UNSEEN static void* block_of_caller() { return scheduler.fibers[scheduler.running]->block; }

int meet(bool value, const char* file, int line) {
  void* const block = block_of_caller();
  order_before(block);
  const bool result = arrive(value, file, line);
  order_after(block);
  return result;
}

RR_UNSEEN void yield() {
  Scheduler& all = scheduler;
  if (++all.idle > all.live) {
    all.idle = 0;
    // Nobody here can go on before another kernel does: so that it can run.
    constexpr timespec a_moment{0, 20000};
    nanosleep(&a_moment, nullptr);
  }
  switch_to_next();
}

RR_UNSEEN void yield_sometimes() {
  Scheduler& all = scheduler;
  all.random ^= all.random << 13;
  all.random ^= all.random >> 7;
  all.random ^= all.random << 17;
  if (all.random % 64 == 0) yield();
}

uint64_t clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000 + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace fake_cuda
