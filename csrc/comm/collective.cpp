#include "comm/collective.h"

#include "comm/across.h"
#include "comm/on_gpu.h"
#include "comm/on_node.h"

namespace ringreduce {
namespace {

/// Of this rank's inputs.
size_t bytes_of(const Call& call) {
  size_t bytes = 0;
  for (const Tensor& tensor : call.tensors) bytes += tensor.count() * size_of(call.dtype);
  return bytes;
}

TraceRecord record_of(const Core& core, const Call& call, const Work& work, uint64_t sequence,
                      int64_t met_ns, ErrorCode error) {
  TraceRecord record;
  record.communicator = core.name;
  record.sequence = sequence;
  record.kind = call.kind;
  record.op = call.op;
  record.dtype = call.dtype;
  record.bytes = call.kind == Kind::allocate ? call.bytes : bytes_of(call);
  record.algorithm = core.tuner.choose(call.kind, record.bytes);
  record.on_progress_thread = Engine::on_progress_thread();
  record.begin_ns = work.begin_ns;
  record.met_ns = met_ns;
  record.end_ns = work.end_ns;
  record.error = error;
  return record;
}

/// Throws on all nodes what one of them says, or they would be out of step. Empty: nothing.
void throw_on_all_nodes(Core& core, const std::string& failure, const Interrupted& interrupted) {
  if (least_of_all(core, failure.empty() ? 1 : 0, interrupted) == 1) return;
  throw Error(ErrorCode::resource,
              failure.empty() ? "another host could not allocate the memory" : failure);
}

}  // namespace

void run_on_host(Core& core, const Call& call, Work& work, const Interrupted& interrupted) {
  if (core.cluster) {
    run_across(core, call, work, interrupted);
  } else {
    run_on_node(core, call, work, interrupted);
  }
}

uint8_t least_of_all(Core& core, uint8_t mine, const Interrupted& interrupted) {
  char least = static_cast<char>(mine);
  Call tell;
  tell.kind = Kind::allreduce;
  tell.op = Op::min;
  tell.dtype = Dtype::u8;
  tell.tensors = {{&least, &least, {{1}, {}}, {{1}, {}}}};
  Work told;
  run_on_host(core, tell, told, interrupted);
  return static_cast<uint8_t>(least);
}

void run_collective(Core& core, const Call& call, Work& work, const Interrupted& interrupted) {
  Trace& trace = *core.options.trace;
  const bool traced = trace.on();
  int64_t met_ns = 0;
  // The one that it takes first. Later ones are of steps of its own: none but those begin before
  // this has ended.
  const uint64_t sequence = core.sequence.load(std::memory_order_relaxed) + 1;
  if (traced) core.window.note_meeting(&met_ns);
  // A caller that waits can look at a clock itself.
  const bool timed = traced || Engine::on_progress_thread();
  const auto finish = [&](ErrorCode error) {
    if (timed) work.end_ns = now_ns();
    if (!traced) return;
    core.window.note_meeting(nullptr);
    trace.add(record_of(core, call, work, sequence, met_ns, error));
  };
  if (timed) work.begin_ns = now_ns();
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
  const auto allocate = [&](Deadline deadline) {
    return device < 0 ? core.arena->allocate(core.node, size_bytes, deadline)
                      : accelerator_of(core, device, deadline, interrupted)
                            .allocate(core, size_bytes, deadline);
  };
  std::shared_ptr<Block> block;
  std::string failure;
  try {
    block = set_up_together(core, call.header(core.sequence.load()), interrupted, allocate);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::resource || !core.cluster) throw;
    failure = error.what();
  }
  if (core.cluster) throw_on_all_nodes(core, failure, interrupted);
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
