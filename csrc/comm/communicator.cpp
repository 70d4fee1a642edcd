#include "comm/communicator.h"

#include <pthread.h>

#include <thread>

#include "comm/collective.h"
#include "comm/on_gpu.h"

namespace ringreduce {
namespace {

/// Counts the forks between the process that made a communicator and this one: a child has the
/// memory, but neither the threads nor the identity of a rank.
std::atomic<uint64_t> fork_generation{0};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { fork_generation.fetch_add(1); });

Deadline set_up_deadline(const Options& options) { return Deadline::after_s(options.timeout_s); }

}  // namespace

Core::Core(int rank, int size, const Exchange& exchange, const Options& options,
           const OpenNetwork& open_network)
    : rank(rank),
      size(size),
      options(options),
      node(rank, size, exchange, options.in_process, options.host, set_up_deadline(options)),
      group(node, options.in_process, set_up_deadline(options)),
      window(group, node.create_segment(Window::staging_bytes(group), set_up_deadline(options))),
      tuner(size == 1 ? Algorithm::two_shot : options.algorithm, group.claims(), options.measured),
      arena(std::make_shared<Arena>()),
      name(std::make_shared<const std::string>(options.name)) {
  if (node.num_nodes() > 1) {
    cluster = std::make_unique<Cluster>(node, group, rank, exchange, open_network,
                                        set_up_deadline(options));
  } else if (tuner.needs_wire()) {
    wire = std::make_unique<ShmWire>(
        group, node.create_segment(ShmWire::segment_bytes(), set_up_deadline(options)));
  }
}

std::shared_ptr<Accelerator> Core::accelerator() const {
  std::lock_guard lock(mutex_);
  return accelerator_;
}

void Core::set_accelerator(std::shared_ptr<Accelerator> accelerator) {
  std::lock_guard lock(mutex_);
  accelerator_ = std::move(accelerator);
}

Communicator::Communicator(int rank, int size, const Exchange& exchange, const Options& options,
                           const OpenNetwork& open_network)
    : core_(std::make_shared<Core>(rank, size, exchange, options, open_network)),
      engine_(std::make_shared<Engine>()),
      fork_generation_(fork_generation.load()) {}

bool Communicator::in_forked_child() const {
  return fork_generation_ != fork_generation.load(std::memory_order_relaxed);
}

void Communicator::check_process() const {
  if (in_forked_child()) {
    throw Error(ErrorCode::closed, "this process was forked from rank " +
                                       std::to_string(core_->rank) +
                                       " and is no rank itself: use ringreduce in the parent only");
  }
}

void Communicator::check_usable() {
  check_process();
  if (closed_)
    throw Error(ErrorCode::closed, "communicator '" + core_->options.name + "' is closed");
}

void Communicator::run(const Call& call, Work& work, const Interrupted& interrupted) {
  check_usable();
  if (call.device >= 0) check_on_gpu(*core_, call);
  run_in_order([&](const Interrupted& asked) { run_collective(*core_, call, work, asked); },
               interrupted);
  // Now, not before: a rank that left this call out would be out of step with the others.
  if (const std::exception_ptr error = engine_->take_unseen_error()) std::rethrow_exception(error);
}

std::shared_ptr<Work> Communicator::start(Call call) {
  check_usable();
  if (call.device >= 0) {
    if (cuda::capturing(call.stream)) {
      // A graph records what is enqueued now, and on this stream.
      auto work = std::make_shared<Work>();
      run(call, *work, {});
      work->finish(nullptr);
      return work;
    }
    call.after = cuda::record(call.device, call.stream);
    check_on_gpu(*core_, call);
  }
  return engine_->enqueue(
      [core = core_, call = std::move(call)](Work& work) { run_collective(*core, call, work, {}); },
      true);
}

std::shared_ptr<Block> Communicator::allocate(size_t size_bytes, int device,
                                              const Interrupted& interrupted) {
  check_usable();
  if (device >= 0) check_device(*core_, device);
  std::shared_ptr<Block> block;
  run_in_order(
      [&](const Interrupted& asked) { block = run_allocate(*core_, size_bytes, device, asked); },
      interrupted);
  return block;
}

void Communicator::check() {
  check_usable();
  if (!core_->group.aborted()) return;
  told_ = true;
  throw_aborted(*core_, "a collective");
}

template <class Operation>
void Communicator::run_in_order(const Operation& operation, const Interrupted& interrupted) {
  {
    const Engine::Turn turn(*engine_);
    try {
      if (turn.granted()) return operation(interrupted);
    } catch (...) {
      told_ = true;
      throw;
    }
  }
  // Others are under way. The caller waits here until it has ended, so references stay valid.
  wait(*engine_->enqueue([&operation](Work&) { operation({}); }, false), Deadline::never(),
       interrupted);
}

void Communicator::abort(const std::string& reason) {
  if (in_forked_child()) return;  // the parent's business
  core_->group.abort(ErrorCode::peer_failed, core_->rank, reason);
}

void Communicator::mark_reported() {
  if (in_forked_child()) return;
  if (core_->cluster) core_->cluster->tell_abort();
  core_->group.mark_reported();
}

bool Communicator::all_reported() const { return !core_->cluster && core_->group.all_reported(); }

void Communicator::close() {
  if (closed_.exchange(true)) return;
  if (in_forked_child()) return;  // the parent's business
  core_->closing.store(true);
  if (!engine_->idle()) {
    abort("rank " + std::to_string(core_->rank) +
          " closed the communicator while an operation was under way");
  }
  engine_->stop();
  const bool idle = engine_->idle();  // after stop: another thread's call cannot begin any more
  core_->group.depart();
  if (core_->cluster) core_->cluster->close(idle);
  if (const std::shared_ptr<Accelerator> open = core_->accelerator()) open->close();
}

bool Communicator::drain(double timeout_s, const Interrupted& interrupted) {
  check_process();
  const Deadline deadline = Deadline::after_s(timeout_s);
  bool ended = engine_->drain(deadline, interrupted);
  if (const std::shared_ptr<Accelerator> open = core_->accelerator(); open && ended) {
    ended = open->drain(deadline, interrupted);
  }
  const std::exception_ptr error = engine_->take_unseen_error();
  // Of an abort the user has to hear once, not once for every operation that it ended.
  if (error && !(told_ && core_->group.aborted())) std::rethrow_exception(error);
  return ended;
}

bool Communicator::wait(Work& work, Deadline deadline, const Interrupted& interrupted) {
  if (!work.done()) {
    check_process();  // no thread of the child's works on it
    engine_->refuse_within_operation();
  }
  const Work::Outcome outcome = work.wait(deadline, interrupted);
  if (outcome == Work::Outcome::timed_out) return false;
  if (outcome == Work::Outcome::interrupted) {
    core_->group.abort_interrupted();
    work.wait(Deadline::never(), {});
  }
  if (work.failed()) told_ = true;
  work.get();
  return true;
}

bool Communicator::wait(cuda::Event& event, Deadline deadline, const Interrupted& interrupted) {
  while (!event.done()) {
    if (deadline.passed(now_ns())) return false;
    if (interrupted && interrupted()) core_->group.abort_interrupted();
    if (core_->group.aborted()) break;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  check();
  return true;
}

}  // namespace ringreduce
