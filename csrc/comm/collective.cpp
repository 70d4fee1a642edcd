#include "comm/collective.h"

#include "algorithms/one_shot.h"
#include "algorithms/ring.h"
#include "algorithms/tree.h"
#include "algorithms/two_shot.h"
#include "comm/across.h"
#include "comm/on_gpu.h"
#include "shm/staged.h"

namespace ringreduce {
namespace {

/// Blocks of an allreduce end on cache lines: no two ranks write to the same one.
constexpr size_t block_granule = line_bytes;

class Collective {
 public:
  Collective(Core& core, const Call& call, Work& work, const Interrupted& interrupted)
      : core_(core),
        call_(call),
        work_(work),
        operands_(call),
        message_(operands_.message()),
        header_(call.header(core.sequence.fetch_add(1) + 1)),
        watch_(core.watch(header_, interrupted)) {
    message_.reduction.size = core.size;
  }

  void run() {
    if (core_.group.aborted()) throw_failure();
    core_.window.begin(header_, message_, watch_);
    if (call_.meets_only) {
      core_.window.arrive();
    } else {
      move();
    }
    if (core_.window.mismatch()) throw_mismatch();
    if (core_.window.stopped() || wire_stopped_) throw_failure();
    operands_.finish();
  }

 private:
  void move() {
    switch (call_.kind) {
      case Kind::barrier:
      case Kind::allocate:
        core_.window.arrive();
        break;
      case Kind::allreduce:
        allreduce();
        break;
      case Kind::reduce_scatter:
        reduce_scatter();
        break;
      case Kind::allgather:
        allgather();
        break;
      case Kind::broadcast:
        broadcast();
        break;
      case Kind::reduce:
        reduce_to_root();
        break;
    }
  }

  bool uses_ring() const {
    return core_.tuner.choose(call_.kind, 0).algorithm == Algorithm::ring && core_.size > 1;
  }
  Ring ring() const { return {core_.rank, core_.size}; }

  void allreduce() {
    const size_t count = operands_.count();
    const Blocks blocks = Blocks::even(count, core_.size, block_granule);
    switch (core_.tuner.choose(Kind::allreduce, message_bytes()).algorithm) {
      case Algorithm::one_shot:
        one_shot_allreduce(core_.window, count);
        break;
      case Algorithm::ring:
        if (!core_.window.arrive()) return;
        over_wire(
            [&](ShmWire& wire, size_t chunk) { ring_allreduce(wire, ring(), blocks, chunk); });
        break;
      case Algorithm::tree:
        if (!core_.window.arrive()) return;
        over_wire([&](ShmWire& wire, size_t chunk) {
          tree_allreduce(wire, core_.rank, core_.size, count, chunk);
        });
        break;
      default:
        two_shot(blocks);
    }
  }

  /// Symmetric where all ranks' tensors are; staged where any is not. Small messages are left to
  /// the last to arrive, if there is one: the others, who share its core, would only be woken to
  /// help.
  void two_shot(const Blocks& blocks) {
    publish_place();
    Staged staged(core_.window, Staged::Phases::allreduce, blocks);
    if (header_.segment == 0) staged.prepare_early();
    const bool one_does_all = core_.group.claims() && core_.tuner.small(message_bytes());
    const auto alone = [&] {
      const int symmetric = num_symmetric();
      if (symmetric == core_.size) {
        reach_symmetric();
        core_.window.reduce_alone(operands_.count());
      } else if (symmetric == 0 && staged.rounds() == 1) {
        staged.combine_alone();
      }
    };
    if (!core_.window.arrive(one_does_all ? std::function<void()>(alone) : nullptr)) return;
    const int symmetric = num_symmetric();
    if (symmetric == core_.size) {
      if (one_does_all) return;
      reach_symmetric();
      two_shot_allreduce(core_.window);
    } else {
      staged.met(symmetric == 0, one_does_all && symmetric == 0 && staged.rounds() == 1);
      run_staged(staged);
    }
  }

  int num_symmetric() const {
    int symmetric = 0;
    for (int peer = 0; peer < core_.size; ++peer) {
      symmetric += core_.window.header_of(peer).segment != 0;
    }
    return symmetric;
  }

  size_t message_bytes() const { return operands_.count() * message_.item_bytes; }

  void publish_place() {
    if (call_.tensors.size() != 1 || message_.inputs.empty()) return;
    const Run& input = message_.inputs.front();
    const Run& output = message_.outputs.front();
    const size_t bytes = input.count * message_.item_bytes;
    const Arena::Place from = core_.arena->locate(input.data, bytes);
    const Arena::Place to = core_.arena->locate(output.data, bytes);
    if (from.segment == 0 || from.segment != to.segment || bytes == 0) return;
    header_.segment = from.segment;
    header_.input_offset = from.offset_bytes;
    header_.output_offset = to.offset_bytes;
  }

  void reach_symmetric() {
    const size_t bytes = message_bytes();
    for (int peer = 0; peer < core_.size; ++peer) {
      const Header header = core_.window.header_of(peer);
      const char* input = core_.arena->at(peer, {header.segment, header.input_offset}, bytes);
      char* output = core_.arena->at(peer, {header.segment, header.output_offset}, bytes);
      if (!input || !output) {
        core_.group.abort(
            ErrorCode::peer_failed, peer,
            "rank " + std::to_string(peer) + " published memory outside of its segment");
        throw_failure();
      }
      core_.window.set_symmetric(peer, input, output);
    }
    core_.window.begin_symmetric(operands_.count());
  }

  void run_staged(Staged& staged) {
    staged_rounds(staged, staged.rounds(), staged.lead());
    staged.finish();
  }

  template <class Algorithm>
  void over_wire(Algorithm algorithm) {
    ShmWire& wire = *core_.wire;
    wire.begin(message_, watch_);
    algorithm(wire, wire.chunk_elements());
    wire_stopped_ = wire.stopped();
  }

  void scatter(const Blocks& blocks) {
    Staged staged(core_.window, Staged::Phases::reduce_scatter, blocks);
    if (!uses_ring()) staged.prepare_early();
    if (!core_.window.arrive()) return;
    if (uses_ring()) {
      over_wire(
          [&](ShmWire& wire, size_t chunk) { ring_reduce_scatter(wire, ring(), blocks, chunk); });
    } else {
      staged.met(true, false);
      run_staged(staged);
    }
  }

  /// After the ranks have met.
  void gather(const Blocks& blocks) {
    message_.copy_across(blocks[core_.rank]);
    if (uses_ring()) {
      over_wire([&](ShmWire& wire, size_t chunk) { ring_allgather(wire, ring(), blocks, chunk); });
    } else {
      Staged staged(core_.window, Staged::Phases::allgather, blocks);
      run_staged(staged);
    }
  }

  void reduce_scatter() {
    const std::vector<size_t> offsets = operands_.scatter_rows(core_.rank, core_.size);
    scatter(Blocks::table(offsets.data(), core_.size));
  }

  void reduce_to_root() { scatter(Blocks::single(operands_.count(), core_.size, call_.root)); }

  void broadcast() {
    if (core_.window.arrive()) gather(Blocks::single(operands_.count(), core_.size, call_.root));
  }

  void allgather() {
    if (!core_.window.arrive()) return;
    for (int peer = 0; peer < core_.size; ++peer) {
      work_.counts.push_back(core_.window.header_of(peer).rows);
    }
    const std::vector<size_t> offsets = allocate_output(work_, header_.count, message_.item_bytes);
    operands_.place_inputs_at(offsets[static_cast<size_t>(core_.rank)]);
    operands_.set_output(work_.output.get(), offsets.back());
    gather(Blocks::table(offsets.data(), core_.size));
  }

  [[noreturn]] void throw_failure() const { throw_aborted(core_, header_); }

  [[noreturn]] void throw_mismatch() const {
    std::vector<Header> headers;
    for (int peer = 0; peer < core_.size; ++peer) headers.push_back(core_.window.header_of(peer));
    ringreduce::throw_mismatch(core_, headers);
  }

  Core& core_;
  const Call& call_;
  Work& work_;
  Operands operands_;
  Message& message_;
  Header header_;
  GroupWatch watch_;
  bool wire_stopped_ = false;
};

/// Of this rank's inputs.
size_t bytes_of(const Call& call) {
  size_t bytes = 0;
  for (const Tensor& tensor : call.tensors) bytes += tensor.count() * size_of(call.dtype);
  return bytes;
}

/// The operation's number is still the last one that began: the next one begins after this.
TraceRecord record_of(const Core& core, const Call& call, const Work& work, int64_t met_ns,
                      ErrorCode error) {
  TraceRecord record;
  record.communicator = core.name;
  record.sequence = core.sequence.load(std::memory_order_relaxed);
  record.kind = call.kind;
  record.op = call.op;
  record.dtype = call.dtype;
  record.bytes = call.kind == Kind::allocate ? call.bytes : bytes_of(call);
  record.algorithm = core.tuner.choose(call.kind, record.bytes).algorithm;
  record.on_progress_thread = Engine::on_progress_thread();
  record.begin_ns = work.begin_ns;
  record.met_ns = met_ns;
  record.end_ns = work.end_ns;
  record.error = error;
  return record;
}

}  // namespace

std::vector<size_t> allocate_output(Work& work, size_t row_elements, size_t item_bytes) {
  // What peers say of their sizes is checked against this.
  constexpr size_t largest_result_bytes = size_t{1} << 46;
  std::vector<size_t> offsets{0};
  for (const size_t rows : work.counts) offsets.push_back(offsets.back() + rows * row_elements);
  work.output_bytes = offsets.back() * item_bytes;
  if (work.output_bytes > largest_result_bytes) throw std::bad_alloc();
  work.output.reset(new char[work.output_bytes]);
  return offsets;
}

void run_on_host(Core& core, const Call& call, Work& work, const Interrupted& interrupted) {
  if (core.cluster) {
    run_across(core, call, work, interrupted);
  } else {
    Collective(core, call, work, interrupted).run();
  }
}

void run_collective(Core& core, const Call& call, Work& work, const Interrupted& interrupted) {
  Trace& trace = *core.options.trace;
  const bool traced = trace.on();
  int64_t met_ns = 0;
  if (traced) core.window.note_meeting(&met_ns);
  const auto finish = [&](ErrorCode error) {
    work.end_ns = now_ns();
    if (!traced) return;
    core.window.note_meeting(nullptr);
    trace.add(record_of(core, call, work, met_ns, error));
  };
  work.begin_ns = now_ns();
  try {
    if (call.device >= 0 && call.kind != Kind::allocate) {
      run_on_gpu(core, call, work, interrupted);
    } else {
      run_on_host(core, call, work, interrupted);
    }
  } catch (const Error& error) {
    finish(error.code());
    throw;  // all ranks have it, or an abort told them
  } catch (const std::exception& error) {
    finish(ErrorCode::resource);
    core.abort_failed(error);  // no memory, say: the others would wait for this rank
    throw;
  }
  finish(ErrorCode::none);
}

std::shared_ptr<Block> run_allocate(Core& core, size_t size_bytes, int device,
                                    const Interrupted& interrupted) {
  Call call;
  call.kind = Kind::allocate;
  call.bytes = size_bytes;
  call.device = device;
  Work work;
  run_collective(core, call, work, interrupted);
  const Header header = call.header(core.sequence.load());
  GroupWatch watch = core.watch(header, interrupted);
  const std::function<bool()> stop = [&watch] { return watch.stop(); };
  Deadline deadline = Deadline::after_s(core.options.timeout_s);
  deadline.stop = &stop;
  std::shared_ptr<Block> block;
  std::string failure;
  try {
    block = device < 0
                ? core.arena->allocate(core.node, size_bytes, deadline)
                : accelerator_of(core, device, deadline).allocate(core, size_bytes, deadline);
  } catch (const Error& error) {
    // A lack of memory is told to all ranks of a node alike; else somebody has left, or the user
    // wants out.
    if (error.code() == ErrorCode::resource && core.cluster) {
      failure = error.what();
    } else {
      if (error.code() == ErrorCode::resource || !watch.stop()) throw;
      throw_aborted(core, header);
    }
  }
  if (core.cluster) {
    // Other nodes fail with the one that did, or they would be out of step.
    char failed = failure.empty() ? 0 : 1;
    Call tell;
    tell.kind = Kind::allreduce;
    tell.op = Op::max;
    tell.dtype = Dtype::u8;
    tell.tensors = {{&failed, &failed, {{1}, {}}, {{1}, {}}}};
    Work told;
    run_collective(core, tell, told, interrupted);
    if (failed != 0) {
      throw Error(ErrorCode::resource,
                  failure.empty() ? "another host could not allocate the memory" : failure);
    }
  }
  return block;
}

/// "rank 0 calls A; ranks 1, 2 call B", the same text on all ranks.
void throw_mismatch(const Core& core, const std::vector<Header>& headers) {
  std::string sides;
  bool alike = false;
  std::vector<bool> told(headers.size(), false);
  for (size_t rank = 0; rank < headers.size(); ++rank) {
    if (told[rank]) continue;
    const std::string call = headers[rank].describe();
    std::string same;
    int others = 0;
    for (size_t peer = rank; peer < headers.size(); ++peer) {
      if (headers[peer].digest() != headers[rank].digest()) continue;
      told[peer] = true;
      same += (others++ ? ", " : "") + std::to_string(peer);
    }
    if (sides.find(call) != std::string::npos) alike = true;
    sides += (sides.empty() ? "" : "; ") + std::string(others > 1 ? "ranks " : "rank ") + same +
             (others > 1 ? " call " : " calls ") + call;
  }
  if (alike) sides += " with other shapes, dtypes or order of the tensors that are not shown";
  throw Error(ErrorCode::mismatch,
              "collective #" + std::to_string(headers[0].sequence) + " of communicator '" +
                  core.options.name + "' differs between ranks: " + sides + " (you are rank " +
                  std::to_string(core.rank) +
                  "). Every rank must make the same calls in the same order. No data was changed, "
                  "and the communicator can still be used");
}

void throw_aborted(const Core& core, const Header& header) {
  throw_aborted(core, header.describe() + " #" + std::to_string(header.sequence));
}

void throw_aborted(const Core& core, const std::string& during) {
  const AbortRecord record = core.group.abort_record();
  const bool mine = record.culprit == core.rank;
  ErrorCode code = record.code;
  if (code == ErrorCode::interrupted && !mine) code = ErrorCode::peer_failed;
  throw Error(
      code,
      during + " of communicator '" + core.options.name + "' failed: " + record.reason +
          ". Detected by rank " + std::to_string(record.detector) + "; you are rank " +
          std::to_string(core.rank) +
          ". The communicator is dead, and what its tensors held is undefined: end the job and "
          "restart it from a checkpoint");
}

}  // namespace ringreduce
