// What drivers do to those who count on more than they promise: contexts that threads make
// unasked, graphs that others record meanwhile, memory that is unmapped under a kernel, peers in
// reach whose memory is not, and a communicator that is closed while it is at work.
#include "gpu_ranks.h"

namespace ringreduce {
namespace {

/// The end of a communicator neither ruins the graph that its user records meanwhile, nor has any
/// of the library's threads used another GPU.
void end_beside_a_capture(Rank& self) {
  Device device;
  float* const data = device.copy_of(input_of<float>(self.rank, 3000, 0));
  self.run(on(device, Kind::allreduce, data, data, {3000}));
  const std::shared_ptr<Work> work = self.start(on(device, Kind::allreduce, data, data, {3000}));
  self.finish(*work);
  work->event->hold_back(device.stream());
  device.synchronize();
  const size_t before = fake_cuda::allocated_bytes();
  require_cuda(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeGlobal));
  self.comm->close();
  while (fake_cuda::allocated_bytes() == before) std::this_thread::yield();
  cudaGraph_t graph = nullptr;
  require_cuda(cudaStreamEndCapture(device.stream(), &graph));
  require_cuda(cudaGraphDestroy(graph));
  require(!fake_cuda::used(1 - device_number), "the library has used another rank's GPU");
}

/// The check of the path finds out, and data go through host memory from then on.
void unreachable(Rank& self) {
  check_path(self, false);
  Device device;
  float* const data = device.copy_of(input_of<float>(self.rank, 3000, 1));
  for (int look = 0; look < 10; ++look) {  // as the watcher does
    usleep(5000);
    self.barrier();
  }
  self.run(on(device, Kind::allreduce, data, data, {3000}));
  require_equal(device.get(data, 3000).data(), reduced<float>(Op::sum, self.size, 3000, 1),
                "through host memory");
}

/// A symmetric block that all have dropped, while a kernel that uses it waits on the stream.
void dropped_in_use(Rank& self) {
  Device device;
  const size_t count = 500'000;
  for (int round = 0; round < 3; ++round) {
    std::shared_ptr<Block> block = self.comm->allocate(count * sizeof(float), device_number, {});
    float* const data = reinterpret_cast<float*>(block->data());
    device.put(data, input_of<float>(self.rank, count, round));
    require_cuda(cudaLaunchHostFunc(device.stream(), [](void*) { usleep(20'000); }, nullptr));
    self.run(on(device, Kind::allreduce, data, data, {length(count)}));
    float* const kept = device.empty<float>(count);
    require_cuda(
        cudaMemcpyAsync(kept, data, count * sizeof(float), cudaMemcpyDefault, device.stream()));
    block.reset();
    self.comm->allocate(2 * count * sizeof(float), device_number, {});  // no room: all is dropped
    require_equal(device.get(kept, count).data(), reduced<float>(Op::sum, self.size, count, round),
                  "a block that was dropped");
  }
  error_of(ErrorCode::invalid, [&] { self.comm->allocate(10, device_number + 1, {}); });
}

/// What the progress thread launches meanwhile has all that it needs, or is not launched.
void closed_at_work(Rank& self) {
  Device device;
  float* const data = device.copy_of(input_of<float>(self.rank, 3000, 0));
  for (int round = 0; round < 20; ++round) {
    self.run(on(device, Kind::allreduce, data, data, {3000}));
    for (int call = 0; call < 3; ++call) {
      self.start(on(device, Kind::allreduce, data, data, {3000}));
    }
    self.comm->close();
    self.comm = self.open();
  }
}

}  // namespace
}  // namespace ringreduce

int main() {
  using namespace ringreduce;
  alarm(limit_s);
  const auto each = [](void (*body)(Rank&)) {
    return [body](Rank& self) {
      device_number = self.rank;
      body(self);
    };
  };
  fake_cuda::machine().devices = 2;
  announce("the end beside a capture", 2);
  run_processes(2, each(end_beside_a_capture));
  announce("memory dropped in use", 2);
  run_processes(2, each(dropped_in_use));
  announce("out of reach", 2);
  fake_cuda::machine().loses_writes = true;
  run_processes(2, each(unreachable));
  fake_cuda::machine() = {};
  announce("closed at work", 1);
  run_ranks(1, {}, closed_at_work);
}
