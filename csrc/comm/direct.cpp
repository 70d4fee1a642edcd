#include "comm/direct.h"

#include <algorithm>
#include <thread>

#include "algorithms/hierarchical.h"
#include "algorithms/ring.h"
#include "comm/steps.h"

namespace ringreduce {
namespace {

/// How often a wait for the device looks before it gives the core away, and for how long then.
constexpr int spins = 1000;
constexpr auto nap = std::chrono::microseconds(50);

}  // namespace

bool wait_for_device(cuda::Event& event, Watch& watch) {
  for (int look = 0; !event.done(); ++look) {
    if (look < spins) continue;
    if (watch.stop()) return false;
    std::this_thread::sleep_for(nap);
  }
  return true;
}

Direct::Direct(Cluster& cluster, const Group& group, cuda::Gpu& gpu, int device)
    : cluster_(cluster),
      group_(group),
      gpu_(gpu),
      device_(device),
      memory_(gpu.allocate(memory_bytes)) {}

void Direct::free() { gpu_.free(memory_, memory_bytes); }

bool Direct::allreduce(const cuda::DeviceCall& call, int ranks, size_t chunk, void* stream,
                       Watch& watch) {
  const std::shared_ptr<void> borrowed = cuda::borrow(device_);  // MPI looks for its memory there
  stream_ = stream;
  const size_t item_bytes = size_of(call.dtype), partial_bytes = partial_size_of(call.dtype);
  // Where one node widens, all nodes have its segments.
  const bool widens = cluster_.shape().local_size > 1 && partial_bytes != item_bytes;
  const size_t piece = widens ? widened_bytes / partial_bytes : call.count;
  for (size_t segment = 0;; ++segment) {
    const Chunk part = Chunk{0, call.count}.piece(segment, piece);
    if (part.empty()) return true;
    cuda::DeviceCall of_part = call;
    of_part.count = part.length;
    of_part.input += part.offset * item_bytes;
    of_part.output += part.offset * item_bytes;
    if (!reduce_segment(of_part, ranks, chunk, watch)) return false;
  }
}

bool Direct::reduce_segment(const cuda::DeviceCall& call, int ranks, size_t chunk, Watch& watch) {
  const size_t item_bytes = size_of(call.dtype);
  const Rails rails{cluster_.rails(), call.count, call.count, block_granule};
  cuda::DeviceCall inside = call;
  inside.division = cuda::Division::table;
  for (int local = 0; local <= group_.size(); ++local) {
    inside.offsets[local] = local < rails.rails ? rails.shard(0, local).offset : call.count;
  }
  const size_t begin = inside.offsets[group_.rank()];
  const Chunk mine{begin, inside.offsets[group_.rank() + 1] - begin};
  char* const result = call.output + mine.offset * item_bytes;

  Message message{{call.dtype, call.op, ranks}, item_bytes, {}, {{0, mine.length, result}}};
  if (group_.size() > 1) {
    sum_inside(inside, mine, message);
  } else {
    message.inputs = {{0, mine.length, const_cast<char*>(call.input)}};
  }
  if (!mine.empty()) {
    NetWire& wire = cluster_.device_rail();
    wire.begin(message, watch);
    ring_allreduce(wire, Ring{cluster_.node(), cluster_.nodes()},
                   Blocks::even(mine.length, cluster_.nodes(), block_granule), chunk,
                   NetWire::lanes);
    if (!wire.end()) return false;
  }
  if (group_.size() > 1) {
    inside.gathers = true;
    inside.input = result;
    launch_inside(inside);
  }
  return true;
}

/// The sum over the node of this rank's shard, unfinished: in the output or, of 16-bit floats,
/// where they have been widened. It becomes the message's input.
void Direct::sum_inside(const cuda::DeviceCall& call, Chunk mine, Message& message) {
  cuda::DeviceCall sum = call;
  sum.reduces = true;
  sum.op = unfinished(message.reduction).op;
  const size_t partial_bytes = partial_size_of(call.dtype);
  if (partial_bytes == message.item_bytes) {
    sum.output = message.outputs.front().data;
    message.inputs = message.outputs;
  } else {
    const Target target{memory_, Format::partial};
    const Source source{call.input, Format::storage};
    reduce(message.reduction, {&target, 1}, {&source, 1}, call.count);
    sum.dtype = Dtype::f32;
    sum.input = memory_;
    sum.output = memory_ + mine.offset * partial_bytes;
    message.inputs = {{0, mine.length, sum.output}};
    message.input_format = Format::partial;
  }
  launch_inside(sum);
}

void Direct::launch_inside(cuda::DeviceCall call) {
  gpu_.launch(cuda::Kernel::staged, call, stream_);
}

char* Direct::slots(size_t size_bytes) {
  if (size_bytes > memory_bytes - used_bytes_) {
    throw Error(ErrorCode::resource, "more neighbours on GPUs than a ring has");
  }
  used_bytes_ += size_bytes;
  return memory_ + used_bytes_ - size_bytes;
}

/// Sources as NetWire has them: partial sums, then at most one that is a tensor's.
void Direct::reduce(const Reduction& reduction, std::span<const Target> targets,
                    std::span<const Source> sources, size_t count) {
  cuda::DeviceCall call{};
  call.dtype = reduction.dtype;
  call.op = reduction.op;
  call.count = count;
  for (const Source& source : sources) {
    const auto* const data = static_cast<const char*>(source.data);
    if (source.format == Format::partial) {
      call.inputs[call.num_partials++] = data;
    } else {
      call.input = data;
    }
  }
  for (const Target& target : targets) {
    call.outputs[call.num_outputs++] = static_cast<char*>(target.data);
  }
  call.finished = targets.front().format == Format::storage;
  call.divisor = reduction.op == Op::avg ? reduction.size : 1;
  gpu_.launch(cuda::Kernel::combine, call, stream_);
}

void Direct::copy(void* to, const void* from, size_t size_bytes) {
  gpu_.copy(to, from, size_bytes, stream_);
}

bool Direct::finish(Watch& watch) {
  return wait_for_device(*cuda::record(device_, stream_), watch);
}

}  // namespace ringreduce
