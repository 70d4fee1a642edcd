// Streams, events and graphs: each stream is a thread that runs its operations in order; a graph is
// the list of operations that were recorded, in the order in which they came.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>

#include "cuda/kernels.h"
#include "grid.h"
#include "state.h"

namespace fake_cuda {
namespace {

std::atomic<unsigned> most_delay_us{[] {
  const char* const given = std::getenv("FAKE_CUDA_DELAY_US");
  return given ? static_cast<unsigned>(std::atoi(given)) : 0u;
}()};
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

void delay(std::mt19937& random) {
  const unsigned most_us = most_delay_us.load(std::memory_order_relaxed);
  if (most_us == 0 || random() % 2 == 0) return;
  std::this_thread::sleep_for(std::chrono::microseconds(random() % most_us));
}

void work(CUstream_st* stream, unsigned seed) {
  State& all = state();
  std::mt19937 random(seed);
  std::unique_lock lock(all.mutex);
  for (;;) {
    all.changed.wait(lock, [&] { return stream->closing || !stream->queue.empty(); });
    if (stream->queue.empty()) return;
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    lock.unlock();
    delay(random);
    operation();
    operation = nullptr;
    lock.lock();
    ++stream->progress->done;
    all.changed.notify_all();
  }
}

CUstream_st* new_stream(int device, bool blocking) {
  static unsigned seed = 0;
  auto* const stream = new CUstream_st;
  stream->device = device;
  stream->blocking = blocking;
  stream->id = ++seed;
  stream->worker = std::thread(work, stream, stream->id);
  state().streams.insert(stream);
  return stream;
}

/// Null: no such stream.
CUstream_st* find(cudaStream_t stream) {
  State& all = state();
  if (stream == nullptr || stream == cudaStreamLegacy) {
    CUstream_st*& found = all.default_streams[current_device()];
    if (!found) found = new_stream(current_device(), true);
    return found;
  }
  return all.streams.contains(stream) ? stream : nullptr;
}

bool is_default(const CUstream_st* stream) {
  const auto found = state().default_streams.find(stream->device);
  return found != state().default_streams.end() && found->second == stream;
}

void wait_for(const std::shared_ptr<Progress>& progress, uint64_t ticket) {
  std::unique_lock lock(state().mutex);
  state().changed.wait(lock, [&] { return progress->done >= ticket; });
}

void enqueue(CUstream_st* stream, Operation operation) {
  stream->queue.push_back(std::move(operation));
  ++stream->progress->enqueued;
  state().changed.notify_all();
}

/// The default stream waits for all blocking ones, and they for it.
void order_by_default_stream(CUstream_st* stream) {
  State& all = state();
  const auto after = [stream](const CUstream_st* other) {
    if (other->progress->done == other->progress->enqueued) return;
    enqueue(stream, [progress = other->progress, ticket = other->progress->enqueued] {
      wait_for(progress, ticket);
    });
  };
  if (!stream->blocking) return;
  if (is_default(stream)) {
    for (const CUstream_st* other : all.streams) {
      if (other != stream && other->blocking && other->device == stream->device) after(other);
    }
  } else if (const auto found = all.default_streams.find(stream->device);
             found != all.default_streams.end()) {
    after(found->second);
  }
}

cudaError_t put_locked(CUstream_st* stream, Operation operation) {
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->capture) {
    if (stream->capture->invalidated) return cudaErrorStreamCaptureInvalidated;
    stream->capture->operations.push_back(std::move(operation));
    ++stream->capture->members[stream].operations;
    return cudaSuccess;
  }
  if (is_default(stream)) {
    for (const auto& capture : state().captures) {
      for (const auto& [member, joined] : capture->members) {
        if (!member->blocking || member->device != stream->device) continue;
        capture->invalidated = true;
        return cudaErrorStreamCaptureImplicit;
      }
    }
  }
  order_by_default_stream(stream);
  enqueue(stream, std::move(operation));
  return cudaSuccess;
}

cudaError_t allowed_locked() {
  for (const auto& capture : state().captures) {
    const bool mine = capture->thread == std::this_thread::get_id();
    const bool forbids = (mine && capture->mode != cudaStreamCaptureModeRelaxed &&
                          thread_mode != cudaStreamCaptureModeRelaxed) ||
                         (capture->mode == cudaStreamCaptureModeGlobal &&
                          thread_mode == cudaStreamCaptureModeGlobal);
    if (!forbids) continue;
    capture->invalidated = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  return cudaSuccess;
}

/// Blocks until the stream is idle.
cudaError_t finish(std::unique_lock<std::mutex>& lock, CUstream_st* stream) {
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->capture) {
    stream->capture->invalidated = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  const std::shared_ptr<Progress> progress = stream->progress;
  const uint64_t ticket = progress->enqueued;
  state().changed.wait(lock, [&] { return progress->done >= ticket; });
  return cudaSuccess;
}

void run_kernel(int device, void (*kernel)(ringreduce::cuda::DeviceCall),
                const ringreduce::cuda::DeviceCall& call, unsigned blocks, unsigned threads) {
  State& all = state();
  const int needed = static_cast<int>(blocks);
  if (needed > machine().processors) fail("a kernel has more blocks than the device has room for");
  {
    std::unique_lock lock(all.mutex);
    int& busy = all.busy_processors[device];
    all.changed.wait(lock, [&] { return busy + needed <= machine().processors; });
    busy += needed;
  }
  run_grid(blocks, threads, [kernel, &call] { kernel(call); });
  const std::lock_guard lock(all.mutex);
  all.busy_processors[device] -= needed;
  all.changed.notify_all();
}

}  // namespace

State& state() {
  static auto* const all = new State;
  return *all;
}

size_t num_queued(void* stream) {
  const std::lock_guard lock(state().mutex);
  return static_cast<CUstream_st*>(stream)->queue.size();
}

void set_most_delay_us(unsigned most_us) { most_delay_us = most_us; }

cudaError_t put(cudaStream_t stream, Operation operation) {
  const std::lock_guard lock(state().mutex);
  return put_locked(find(stream), std::move(operation));
}

cudaError_t allowed_in_capture() {
  const std::lock_guard lock(state().mutex);
  return allowed_locked();
}

void synchronize(int device) {
  std::unique_lock lock(state().mutex);
  const std::set<CUstream_st*> streams = state().streams;
  for (CUstream_st* stream : streams) {
    if (stream->device == device && !stream->capture) finish(lock, stream);
  }
}

}  // namespace fake_cuda

using namespace fake_cuda;

// ---- Streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(state().mutex);
  *stream = new_stream(current_device(), (flags & cudaStreamNonBlocking) == 0);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}

/// What has been enqueued still runs.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  State& all = state();
  {
    const std::lock_guard lock(all.mutex);
    if (!all.streams.contains(stream) || is_default(stream)) {
      return note(cudaErrorInvalidResourceHandle);
    }
    all.streams.erase(stream);
    stream->closing = true;
    all.changed.notify_all();
  }
  std::thread([stream] {
    stream->worker.join();
    delete stream;
  }).detach();
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const cudaError_t error = usable()) return note(error);
  std::unique_lock lock(state().mutex);
  return note(finish(lock, find(stream)));
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(state().mutex);
  CUstream_st* const found = find(stream);
  if (!found) return note(cudaErrorInvalidResourceHandle);
  if (const cudaError_t error = allowed_locked()) return note(error);
  return found->progress->done == found->progress->enqueued ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  const std::lock_guard lock(state().mutex);
  CUstream_st* const found = find(stream);
  if (!found) return note(cudaErrorInvalidResourceHandle);
  *id = found->id;
  return cudaSuccess;
}

cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  const std::lock_guard lock(state().mutex);
  CUstream_st* const found = find(stream);
  if (!found) return note(cudaErrorInvalidResourceHandle);
  *device = found->device;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  if (const cudaError_t error = usable()) return note(error);
  if (const cudaError_t error = allowed_in_capture()) return note(error);
  synchronize(current_device());
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(state().mutex);
  CUstream_st* const found = find(stream);
  if (!found || !event) return note(cudaErrorInvalidResourceHandle);
  if (event->capture) {
    if (found->capture && found->capture != event->capture) {
      return note(cudaErrorStreamCaptureIsolation);
    }
    if (!event->capture->active) return note(cudaErrorInvalidValue);
    found->capture = event->capture;
    found->capture->members[found];
    Capture::Member& from = found->capture->members[event->captured_stream];
    if (event->captured_operations > from.joined) from.joined = event->captured_operations;
    return cudaSuccess;
  }
  if (found->capture) {
    if (!event->progress) return cudaSuccess;
    found->capture->invalidated = true;
    return note(cudaErrorStreamCaptureIsolation);
  }
  if (!event->progress) return cudaSuccess;
  return note(put_locked(
      found, [progress = event->progress, ticket = event->ticket] { wait_for(progress, ticket); }));
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  if (const cudaError_t error = usable()) return note(error);
  return note(put(stream, [function, argument] { function(argument); }));
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments,
                             size_t, cudaStream_t stream) {
  if (const cudaError_t error = usable()) return note(error);
  if (!kernel || blocks.x == 0 || threads.x == 0 || threads.x > 1024) {
    return note(cudaErrorInvalidConfiguration);
  }
  using Kernel = void (*)(ringreduce::cuda::DeviceCall);
  const auto entry = reinterpret_cast<Kernel>(const_cast<void*>(kernel));
  auto call = std::make_shared<ringreduce::cuda::DeviceCall>();
  std::memcpy(call.get(), arguments[0], sizeof(*call));
  const int device = current_device();
  const unsigned run = threads.x < machine().most_threads ? threads.x : machine().most_threads;
  const std::lock_guard lock(state().mutex);
  CUstream_st* const found = find(stream);
  if (found && found->device != device) return note(cudaErrorInvalidResourceHandle);
  return note(put_locked(found, [device, entry, call, blocks, run] {
    run_kernel(device, entry, *call, blocks.x, run);
  }));
}

// ---- Events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (const cudaError_t error = usable()) return note(error);
  *event = new CUevent_st;
  (*event)->device = current_device();
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(state().mutex);
  CUstream_st* const found = find(stream);
  if (!found || !event || found->device != event->device) {
    return note(cudaErrorInvalidResourceHandle);
  }
  event->capture = found->capture;
  if (found->capture) {
    event->captured_stream = found;
    event->captured_operations = found->capture->members[found].operations;
    return cudaSuccess;
  }
  if (const cudaError_t error = put_locked(found, [] {})) return note(error);
  event->progress = found->progress;
  event->ticket = found->progress->enqueued;
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(state().mutex);
  if (event->capture) return note(cudaErrorStreamCaptureUnsupported);
  if (const cudaError_t error = allowed_locked()) return note(error);
  return !event->progress || event->progress->done >= event->ticket ? cudaSuccess
                                                                    : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const cudaError_t error = usable()) return note(error);
  std::unique_lock lock(state().mutex);
  if (event->capture) return note(cudaErrorStreamCaptureUnsupported);
  if (const cudaError_t error = allowed_locked()) return note(error);
  const std::shared_ptr<Progress> progress = event->progress;
  const uint64_t ticket = event->ticket;
  if (progress) state().changed.wait(lock, [&] { return progress->done >= ticket; });
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (!event) return note(cudaErrorInvalidResourceHandle);
  const std::lock_guard lock(state().mutex);
  delete event;
  return cudaSuccess;
}

// ---- Graphs

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(state().mutex);
  CUstream_st* const found = find(stream);
  if (!found) return note(cudaErrorInvalidResourceHandle);
  *status = !found->capture               ? cudaStreamCaptureStatusNone
            : found->capture->invalidated ? cudaStreamCaptureStatusInvalidated
                                          : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  make_context();
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(state().mutex);
  CUstream_st* const found = find(stream);
  if (!found || is_default(found)) return note(cudaErrorStreamCaptureUnsupported);
  if (found->capture) return note(cudaErrorIllegalState);
  auto capture = std::make_shared<Capture>();
  capture->origin = found;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->members[found];
  found->capture = capture;
  state().captures.insert(capture);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(state().mutex);
  CUstream_st* const found = find(stream);
  *graph = nullptr;
  if (!found || !found->capture) return note(cudaErrorIllegalState);
  const std::shared_ptr<Capture> capture = found->capture;
  if (capture->origin != found) return note(cudaErrorStreamCaptureUnmatched);
  bool joined = true;
  for (const auto& [member, part] : capture->members) {
    member->capture = nullptr;
    if (member != found && part.joined < part.operations) joined = false;
  }
  capture->active = false;
  state().captures.erase(capture);
  if (capture->invalidated) return note(cudaErrorStreamCaptureInvalidated);
  if (!joined) return note(cudaErrorStreamCaptureUnjoined);
  *graph = new CUgraph_st{std::move(capture->operations)};
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  *executable = new CUgraphExec_st{std::make_shared<std::vector<Operation>>(graph->operations)};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (const cudaError_t error = usable()) return note(error);
  return note(put(stream, [operations = executable->operations] {
    for (const Operation& operation : *operations) operation();
  }));
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
