#include "comm/on_gpu.h"

#include <algorithm>

#include "comm/accelerator.h"
#include "comm/collective.h"

namespace ringreduce {
namespace {

class OnGpu {
 public:
  OnGpu(Core& core, const Call& call, Work& work, const Interrupted& interrupted)
      : core_(core),
        call_(call),
        work_(work),
        interrupted_(interrupted),
        item_bytes_(size_of(call.dtype)) {
    for (const Tensor& tensor : call.tensors) count_ += tensor.count();
    if (!call.tensors.empty()) {
      input_ = call.tensors.front().input;
      output_ = call.tensors.front().output;
    }
  }

  void run() {
    meet();
    accelerator_ = &open();
    const std::unique_lock<std::mutex> used = accelerator_->use();
    stream_ = call_.after ? gpu().side_stream() : call_.stream;
    if (call_.after) call_.after->hold_back(stream_);
    gpu().begin(stream_);
    try {
      move();
    } catch (...) {
      gpu().end(stream_);  // what was enqueued is waited for before anything is taken down
      throw;
    }
    gpu().end(stream_);
    if (call_.after) work_.event = cuda::record(call_.device, stream_);
  }

 private:
  cuda::Gpu& gpu() const { return accelerator_->gpu(); }
  size_t rank() const { return static_cast<size_t>(core_.rank); }

  /// With the full header, and with where this rank's tensors lie.
  void meet() {
    Call meeting = call_;
    meeting.meets_only = true;
    const std::shared_ptr<Accelerator> open = core_.accelerator();
    if (open && call_.kind == Kind::allreduce) {
      const Arena::Place from = open->arena()->locate(input_, count_ * item_bytes_);
      const Arena::Place to = open->arena()->locate(output_, count_ * item_bytes_);
      if (from.segment != 0 && from.segment == to.segment) {
        meeting.segment = from.segment;
        meeting.input_offset = from.offset_bytes;
        meeting.output_offset = to.offset_bytes;
      }
    }
    run_on_host(core_, meeting, work_, interrupted_);
    digest_ = meeting.header(0).digest();
  }

  void move() {
    if (message_count() == 0) return;  // and yet the end is a moment on the stream
    if (accelerator_->kernels()) {
      launch();
    } else if (const size_t chunk = direct_chunk()) {
      directly(chunk);
    } else {
      through_host();
    }
  }

  Accelerator& open() const {
    return set_up_together(core_, call_.header(core_.sequence.load()), interrupted_,
                           [this](Deadline deadline) -> Accelerator& {
                             return accelerator_of(core_, call_.device, deadline, interrupted_);
                           });
  }

  /// Elements of the whole message, and where each rank's part of it begins.
  size_t message_count() const { return call_.kind == Kind::allgather ? parts().back() : count_; }
  std::vector<size_t> parts() const {
    const std::vector<int64_t>& shape = call_.tensors.front().input_layout.shape;
    if (call_.kind == Kind::allgather) {
      const size_t rows = shape.empty() ? 1 : static_cast<size_t>(shape.front());
      std::vector<size_t> offsets{0};
      // A row of no elements on this rank has none on any.
      const size_t row_elements = rows == 0 ? row_of(shape) : count_ / rows;
      for (const size_t each : call_.rows) offsets.push_back(offsets.back() + each * row_elements);
      return offsets;
    }
    const auto rows = static_cast<size_t>(shape.front());
    return split_rows(rows, rows == 0 ? 0 : count_ / rows, core_.size);
  }
  static size_t row_of(const std::vector<int64_t>& shape) {
    size_t elements = 1;
    for (size_t i = 1; i < shape.size(); ++i) elements *= static_cast<size_t>(shape[i]);
    return elements;
  }

  // ---- By kernels.

  cuda::DeviceCall device_call() const {
    cuda::DeviceCall call{};
    call.dtype = call_.dtype;
    call.op = call_.op;
    call.digest = static_cast<uint32_t>(digest_ ^ digest_ >> 32);
    call.count = message_count();
    call.input = input_;
    call.output = output_;
    return call;
  }

  void launch() {
    cuda::DeviceCall call = device_call();
    call.reduces = call_.kind != Kind::allgather && call_.kind != Kind::broadcast;
    call.gathers = call_.kind != Kind::reduce_scatter && call_.kind != Kind::reduce;
    cuda::Kernel kernel = cuda::Kernel::staged;
    if (call_.kind == Kind::allreduce) {
      kernel = kernel_of_allreduce(call);
    } else if (call_.kind == Kind::broadcast || call_.kind == Kind::reduce) {
      call.division = cuda::Division::single;
      call.owner = call_.root;
    } else {
      call.division = cuda::Division::table;
      const std::vector<size_t> offsets = parts();
      std::copy(offsets.begin(), offsets.end(), call.offsets);
    }
    gpu().launch(kernel, call, stream_);
  }

  cuda::Kernel kernel_of_allreduce(cuda::DeviceCall& call) {
    switch (core_.tuner.choose_on_gpu(call_.dtype, count_ * item_bytes_)) {
      case Algorithm::one_shot:
        return cuda::Kernel::one_shot;
      case Algorithm::ring:
        return cuda::Kernel::ring;
      case Algorithm::tree:
        return cuda::Kernel::tree;
      default:
        return reach_symmetric(call) ? cuda::Kernel::two_shot : cuda::Kernel::staged;
    }
  }

  /// Where all ranks' tensors lie, if all are symmetric.
  bool reach_symmetric(cuda::DeviceCall& call) {
    for (int peer = 0; peer < core_.size; ++peer) {
      const Header header = core_.window.header_of(peer);
      if (header.segment == 0) return false;
      const size_t bytes = count_ * item_bytes_;
      const Arena& arena = *accelerator_->arena();
      call.inputs[peer] = arena.at(peer, {header.segment, header.input_offset}, bytes);
      call.outputs[peer] = arena.at(peer, {header.segment, header.output_offset}, bytes);
      if (!call.inputs[peer] || !call.outputs[peer]) {
        core_.group.abort(
            ErrorCode::peer_failed, peer,
            "rank " + std::to_string(peer) + " published memory outside of its segment");
        throw_failure();
      }
    }
    return true;
  }

  // ---- Across nodes, through an MPI that takes device memory.

  /// 0: the host does it.
  size_t direct_chunk() const {
    if (!accelerator_->direct() || call_.kind != Kind::allreduce) return 0;
    return core_.tuner.direct_chunk(count_, core_.cluster->shape(), call_.dtype);
  }

  void directly(size_t chunk) {
    const Header header = call_.header(core_.sequence.load());
    GroupWatch watch = core_.watch(header, interrupted_);
    if (!accelerator_->direct()->allreduce(device_call(), core_.size, chunk, stream_, watch)) {
      throw_failure();
    }
  }

  // ---- Through host memory.

  /// What the host writes to is no longer read by copies that were enqueued before.
  void await() {
    const std::shared_ptr<cuda::Event> event = cuda::record(call_.device, stream_);
    wait_for(*event);
  }

  void wait_for(cuda::Event& event) {
    const Header header = call_.header(core_.sequence.load());
    GroupWatch watch = core_.watch(header, interrupted_);
    if (!wait_for_device(event, watch)) throw_failure();
  }

  void through_host() {
    switch (call_.kind) {
      case Kind::reduce_scatter:
        scatter_through_host();
        break;
      case Kind::allgather:
        gather_through_host();
        break;
      default:
        segments_through_host();
    }
  }

  Call host_call(const char* input, char* output, std::vector<int64_t> shape) const {
    Call call;
    call.kind = call_.kind;
    call.op = call_.op;
    call.dtype = call_.dtype;
    call.root = call_.root;
    const Layout layout{std::move(shape), {}, item_bytes_};
    call.tensors = {{input, output, layout, layout}};
    return call;
  }

  /// Two segments are under way: while the host reduces one, the device brings the next one and
  /// takes the last one back. The stream keeps the copies of one half in order.
  void segments_through_host() {
    const size_t half_bytes = Accelerator::staging_bytes / 2;
    const size_t piece = half_bytes / item_bytes_;
    const size_t segments = (count_ + piece - 1) / piece;
    const bool mine_counts = call_.kind != Kind::broadcast || core_.rank == call_.root;
    const bool gets_result =
        call_.kind == Kind::allreduce || (call_.kind == Kind::reduce) == (core_.rank == call_.root);
    std::shared_ptr<cuda::Event> arrived[2];
    const auto chunk = [&](size_t segment) { return Chunk{0, count_}.piece(segment, piece); };
    const auto half = [&](size_t segment) {
      return accelerator_->staging() + segment % 2 * half_bytes;
    };
    const auto fetch = [&](size_t segment) {
      if (segment >= segments) return;
      const Chunk part = chunk(segment);
      if (mine_counts) {
        gpu().copy(half(segment), input_ + part.offset * item_bytes_, part.length * item_bytes_,
                   stream_);
      }
      arrived[segment % 2] = cuda::record(call_.device, stream_);
    };
    fetch(0);
    for (size_t segment = 0; segment < segments; ++segment) {
      fetch(segment + 1);
      wait_for(*arrived[segment % 2]);
      const Chunk part = chunk(segment);
      char* const data = half(segment);
      const bool writes = call_.kind != Kind::reduce || gets_result;
      run_on_host(core_,
                  host_call(data, writes ? data : nullptr, {static_cast<int64_t>(part.length)}),
                  host_work_, interrupted_);
      if (gets_result) {
        gpu().copy(output_ + part.offset * item_bytes_, data, part.length * item_bytes_, stream_);
      }
    }
  }

  void scatter_through_host() {
    const std::vector<size_t> offsets = parts();
    const size_t mine_bytes = (offsets[rank() + 1] - offsets[rank()]) * item_bytes_;
    await();
    char* const data = accelerator_->pinned(count_ * item_bytes_ + mine_bytes);
    char* const result = data + count_ * item_bytes_;
    gpu().copy(data, input_, count_ * item_bytes_, stream_);
    await();
    Call call = host_call(data, result, call_.tensors.front().input_layout.shape);
    call.tensors.front().output_layout = call_.tensors.front().output_layout;
    run_on_host(core_, call, host_work_, interrupted_);
    gpu().copy(output_, result, mine_bytes, stream_);
  }

  void gather_through_host() {
    await();
    char* const data = accelerator_->pinned(std::max<size_t>(count_ * item_bytes_, 1));
    gpu().copy(data, input_, count_ * item_bytes_, stream_);
    await();
    run_on_host(core_, host_call(data, nullptr, call_.tensors.front().input_layout.shape),
                host_work_, interrupted_);
    gpu().copy(output_, host_work_.output.get(), host_work_.output_bytes, stream_);
    // It is freed with this object. Where the device reads memory that is not pinned by itself, it
    // may not have read it yet.
    await();
  }

  [[noreturn]] void throw_failure() const {
    throw_aborted(core_, call_.header(core_.sequence.load()));
  }

  Core& core_;
  const Call& call_;
  Work& work_;
  const Interrupted& interrupted_;
  const size_t item_bytes_;
  size_t count_ = 0;  // of this rank's input
  const char* input_ = nullptr;
  char* output_ = nullptr;
  uint64_t digest_ = 0;
  Accelerator* accelerator_ = nullptr;
  void* stream_ = nullptr;
  Work host_work_;
};

}  // namespace

void check_device(const Core& core, int device) {
  const std::shared_ptr<Accelerator> open = core.accelerator();
  if (!open || open->device == device) return;
  throw Error(ErrorCode::invalid,
              "communicator '" + core.options.name +
                  "' works on cuda:" + std::to_string(open->device) +
                  ", and this tensor is on cuda:" + std::to_string(device) +
                  ": use one device per rank, or a communicator per device (split)");
}

void check_on_gpu(const Core& core, const Call& call) {
  check_device(core, call.device);
  const std::shared_ptr<Accelerator> open = core.accelerator();
  const char* input_end = nullptr;
  const char* output_end = nullptr;
  for (const Tensor& tensor : call.tensors) {
    const size_t bytes = tensor.count() * size_of(call.dtype);
    if (bytes == 0) continue;
    if (reinterpret_cast<uintptr_t>(tensor.input) % size_of(call.dtype) != 0 ||
        reinterpret_cast<uintptr_t>(tensor.output) % size_of(call.dtype) != 0) {
      throw Error(ErrorCode::invalid, "a tensor on a GPU must be aligned to its elements");
    }
    if ((input_end && tensor.input != input_end) || (output_end && tensor.output != output_end)) {
      throw Error(ErrorCode::invalid, "tensors of one call on a GPU must lie in one buffer");
    }
    input_end = tensor.input + bytes;
    output_end = tensor.output ? tensor.output + bytes : nullptr;
  }
  if (call.after || !cuda::capturing(call.stream)) return;
  if (!open) {
    throw Error(ErrorCode::invalid,
                "the first collective on a GPU sets things up, which a CUDA graph cannot record: "
                "make one call before the capture");
  }
  if (!open->kernels()) {
    throw Error(ErrorCode::invalid,
                "this collective cannot be recorded in a CUDA graph, because the host has its part "
                "in it: " +
                    open->why_host());
  }
}

void run_on_gpu(Core& core, const Call& call, Work& work, const Interrupted& interrupted) {
  try {
    OnGpu(core, call, work, interrupted).run();
  } catch (const Error& error) {
    // The device refused something: the others cannot know.
    if (error.code() == ErrorCode::resource && core.accelerator()) core.abort_failed(error);
    throw;
  }
}

Accelerator& accelerator_of(Core& core, int device, Deadline deadline,
                            const Interrupted& interrupted) {
  if (Engine::on_progress_thread()) cuda::settle(device);
  if (const std::shared_ptr<Accelerator> open = core.accelerator()) return *open;
  auto opened = std::make_shared<Accelerator>(core, device, deadline, interrupted);
  try {
    opened->start(core.shared_from_this());
  } catch (const Error& error) {
    core.abort_failed(error);  // no thread: the others have theirs, and go on
    throw;
  }
  core.set_accelerator(opened);
  return *opened;
}

}  // namespace ringreduce
