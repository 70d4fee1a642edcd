// Collectives on GPU memory from the Communicator down, on a pretended GPU: every kind by kernels
// and through host memory, ranks as threads and as processes, operations that overlap, symmetric
// memory, mismatches, and ranks that fail. The kernels alone are in test_kernels.cpp.
#include <cuda_runtime.h>
#include <signal.h>

#include "gpu_ranks.h"

namespace ringreduce {
namespace {

template <class T>
void require_on_device(Device& device, const T* data, const std::vector<T>& expected,
                       const std::string& what) {
  require_equal(device.get(data, expected.size()).data(), expected, what);
}

template <class T>
void every_kind(Rank& self, size_t count, int salt) {
  Device device;
  const std::vector<T> mine = input_of<T>(self.rank, count, salt);
  const std::vector<T> sum = reduced<T>(Op::sum, self.size, count, salt);
  T* const input = device.copy_of(mine);
  T* const output = device.empty<T>(count);
  self.run(on(device, Kind::allreduce, input, output, {length(count)}));
  require_on_device(device, output, sum, "allreduce");
  require_on_device(device, input, mine, "the input of allreduce");
  self.run(on(device, Kind::allreduce, input, input, {length(count)}, Op::max));
  require_on_device(device, input, reduced<T>(Op::max, self.size, count, salt), "in place");

  const int root = salt % self.size;
  device.put(input, mine);
  self.run(on(device, Kind::broadcast, input, input, {length(count)}, Op::sum, root));
  require_on_device(device, input, input_of<T>(root, count, salt), "broadcast");
  device.put(input, mine);
  T* const target = self.rank == root ? output : nullptr;
  self.run(on(device, Kind::reduce, input, target, {length(count)}, Op::sum, root));
  if (target) require_on_device(device, target, sum, "reduce");

  const size_t rows = count / 3;
  const std::vector<size_t> offsets = split_rows(rows, 3, self.size);
  const size_t begin = offsets[static_cast<size_t>(self.rank)];
  const size_t part = offsets[static_cast<size_t>(self.rank) + 1] - begin;
  Call scatter = on(device, Kind::reduce_scatter, input, output, {length(rows), 3});
  scatter.tensors[0].output_layout.shape[0] = length(part / 3);
  self.run(scatter);
  require_on_device(device, output, reduced<T>(Op::sum, self.size, part, salt, begin), "scatter");

  std::vector<T> all;
  Call gather = on(device, Kind::allgather, input, output, {length(rows + 1), 2});
  for (int rank = 0; rank < self.size; ++rank) {
    gather.rows.push_back(rows + static_cast<size_t>(rank));
    const std::vector<T> theirs = input_of<T>(rank, gather.rows.back() * 2, salt);
    all.insert(all.end(), theirs.begin(), theirs.end());
  }
  const size_t my_rows = gather.rows[static_cast<size_t>(self.rank)];
  T* const gathered = device.empty<T>(all.size());
  T* const gathering = device.copy_of(input_of<T>(self.rank, my_rows * 2, salt));
  gather.tensors = {tensor_of(gathering, gathered, {length(my_rows), 2})};
  self.run(gather);
  require_on_device(device, gathered, all, "allgather");
}

void collectives(Rank& self) {
  int salt = 0;
  for (const size_t count : {size_t{0}, size_t{1}, size_t{7}, size_t{1000}, size_t{40'009}}) {
    every_kind<float>(self, count, ++salt);
    every_kind<bf16>(self, count, ++salt);
    every_kind<int64_t>(self, count, ++salt);
    self.barrier();  // between calls on the host and on the device
  }
}

/// More than the staging of either path holds.
void large(Rank& self) { every_kind<float>(self, 5'000'011, 3); }

/// Several calls under way, on a stream of the communicator's own and on the caller's.
void asynchronous(Rank& self) {
  Device device;
  std::mt19937 common(4711);  // sizes: the same on all ranks
  for (int repetition = 0; repetition < 4; ++repetition) {
    std::vector<std::pair<float*, size_t>> values;
    std::vector<std::shared_ptr<Work>> works;
    for (int index = 0; index < 8; ++index) {
      const size_t count = 1 + (common() % 2 ? common() % 50 : common() % 60'000);
      float* const data = device.copy_of(input_of<float>(self.rank, count, index));
      values.push_back({data, count});
      Call call = on(device, Kind::allreduce, data, data, {length(count)});
      works.push_back(common() % 4 ? self.start(std::move(call)) : self.run(std::move(call)));
      if (common() % 4 == 0) self.barrier();
    }
    for (size_t index = 0; index < works.size(); ++index) {
      self.finish(*works[index]);
      if (works[index]->event) works[index]->event->hold_back(device.stream());
      const auto [data, count] = values[index];
      require_on_device(device, data,
                        reduced<float>(Op::sum, self.size, count, static_cast<int>(index)),
                        "asynchronous");
    }
  }
}

/// Symmetric blocks: alone, beside private memory, freed at different times.
void symmetric(Rank& self) {
  Device device;
  std::shared_ptr<Block> kept;
  for (int salt = 0; salt < 10; ++salt) {
    const size_t count = salt % 3 == 0 ? 900'001 : 30'000;
    const std::shared_ptr<Block> block =
        self.comm->allocate(count * sizeof(float), device_number, {});
    const std::vector<float> input = input_of<float>(self.rank, count, salt);
    float* const data = reinterpret_cast<float*>(block->data());
    device.put(data, input);
    const bool only_some = salt % 4 == 3 && self.rank == 0;  // then all go through staging
    float* const used = only_some ? device.copy_of(input) : data;
    self.run(on(device, Kind::allreduce, used, used, {length(count)}));
    require_on_device(device, used, reduced<float>(Op::sum, self.size, count, salt), "symmetric");
    if (self.chance(3)) kept = block;
  }
}

/// Ranks that mean different things learn it, and go on.
void mismatches(Rank& self) {
  if (self.size == 1) return;
  Device device;
  const size_t count = 1000;
  const std::vector<float> input = input_of<float>(self.rank, count, 1);
  float* const data = device.copy_of(input);
  for (int round = 0; round < 3; ++round) {
    Call call = on(device, Kind::allreduce, data, data, {length(count)});
    std::vector<float> on_host = input;
    const bool odd = self.rank == self.size - 1;
    if (round == 0 && odd) call.op = Op::max;
    if (round == 1 && odd) call.tensors[0].input_layout.shape = {10, 100};
    if (round == 2 && odd) {
      call = call_of(Kind::allreduce, on_host.data(), on_host.data(), {length(count)});
    }
    const std::string text = error_of(ErrorCode::mismatch, [&] { self.run(call); });
    if (round == 2) require_in("on a GPU", text);
    require_on_device(device, data, input, "the operand of a mismatch");
  }
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  require_on_device(device, data, reduced<float>(Op::sum, self.size, count, 1), "after mismatches");
}

void wrong_use(Rank& self) {
  Device device;
  float* const data = device.copy_of(input_of<float>(self.rank, 100, 1));
  Call captured = on(device, Kind::allreduce, data, data, {100});
  require_cuda(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal));
  require_in("before the capture", error_of(ErrorCode::invalid, [&] { self.run(captured); }));
  cudaGraph_t graph = nullptr;
  require_cuda(cudaStreamEndCapture(device.stream(), &graph));
  require_cuda(cudaGraphDestroy(graph));
  self.run(on(device, Kind::allreduce, data, data, {100}));
  Call elsewhere = on(device, Kind::allreduce, data, data, {100});
  elsewhere.device = device_number + 1;
  require_in("works on cuda:", error_of(ErrorCode::invalid, [&] { self.run(elsewhere); }));
  Call apart = on(device, Kind::allreduce, data, data, {10});
  apart.tensors.push_back(tensor_of(data + 50, data + 50, {10}));
  require_in("one buffer", error_of(ErrorCode::invalid, [&] { self.run(apart); }));
  self.run(on(device, Kind::allreduce, data, data, {100}));
}

/// What a rank's stream records, to be replayed on it.
class Graph {
 public:
  Graph(Device& device, const std::function<void()>& record) : stream_(device.stream()) {
    require_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    record();
    require_cuda(cudaStreamEndCapture(stream_, &graph_));
    require_cuda(cudaGraphInstantiate(&executable_, graph_, 0));
  }
  ~Graph() {
    require_cuda(cudaGraphExecDestroy(executable_));
    require_cuda(cudaGraphDestroy(graph_));
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch() { require_cuda(cudaGraphLaunch(executable_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

/// A graph of several calls, replayed with new values.
void replays(Rank& self) {
  Device device;
  const size_t count = 70'001;
  float* const data = device.copy_of(input_of<float>(self.rank, count, 0));
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  device.synchronize();
  self.barrier();
  Graph graph(device, [&] {
    self.run(on(device, Kind::allreduce, data, data, {length(count)}));
    self.start(on(device, Kind::allreduce, data, data, {100}, Op::max));
  });
  for (int salt = 0; salt < 5; ++salt) {
    device.put(data, input_of<float>(self.rank, count, salt));
    self.dawdle();
    graph.launch();
    require_on_device(device, data, reduced<float>(Op::sum, self.size, count, salt), "a replay");
  }
}

/// Rank 0 gives up while the kernels of the others wait for its: they leave, and their hosts say
/// who it was.
void abandoned(Rank& self) {
  if (self.size == 1) return;
  Device device;
  const size_t count = 3000;
  float* const data = device.copy_of(input_of<float>(self.rank, count, 0));
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  Graph graph(device, [&] { self.run(on(device, Kind::allreduce, data, data, {length(count)})); });
  self.barrier();
  if (self.rank == 0) {
    self.comm->abort("rank 0 has had enough");
  } else {
    graph.launch();
    device.synchronize();
    const std::string text = error_of(ErrorCode::peer_failed, [&] { self.comm->check(); });
    require_in("rank 0 has had enough", text);
    error_of(ErrorCode::peer_failed, [&] { self.barrier(); });
  }
}

/// The same, but rank 0 leaves in good order.
void departed(Rank& self) {
  if (self.size == 1) return;
  Device device;
  float* const data = device.copy_of(input_of<float>(self.rank, 3000, 0));
  self.run(on(device, Kind::allreduce, data, data, {3000}));
  device.synchronize();
  Graph graph(device, [&] { self.run(on(device, Kind::allreduce, data, data, {3000})); });
  if (self.rank == 0) {
    self.comm->close();
  } else {
    graph.launch();
    device.synchronize();
    require_in("exited while a kernel waits",
               error_of(ErrorCode::peer_failed, [&] { self.comm->check(); }));
  }
}

void run_threads(int size) {
  const auto run = [size](const Options& options, const std::function<void(Rank&)>& body) {
    run_ranks(size, options, body);
    graveyard.clear();
  };
  for (int algorithm = 0; algorithm < 5; ++algorithm) {
    announce(algorithm_names[algorithm], size);
    Options options;
    options.algorithm = static_cast<Algorithm>(algorithm);
    run(options, collectives);
    if (algorithm == 0) run(options, large);
    run(options, asynchronous);
  }
  announce("symmetric, mismatches, graphs, failures", size);
  run({}, [](Rank& self) { check_path(self, true); });
  for (const auto body : {symmetric, mismatches, wrong_use, replays, abandoned, departed}) {
    run({}, body);
  }
}

// ---- Ranks as processes.

/// A rank is killed while the kernels of the others wait for its.
void killed(Rank& self) {
  Device device;
  float* const data = device.copy_of(input_of<float>(self.rank, 3000, 0));
  self.run(on(device, Kind::allreduce, data, data, {3000}));
  Graph graph(device, [&] { self.run(on(device, Kind::allreduce, data, data, {3000})); });
  self.barrier();
  if (self.rank == 1) raise(SIGKILL);
  graph.launch();
  device.synchronize();
  const std::string text = error_of(ErrorCode::peer_failed, [&] { self.comm->check(); });
  require_in("rank 1", text);
  require_in("died", text);
}

/// All leave while a graph is replayed: nothing is unmapped before its kernels have ended, though
/// they wait for that of rank 0, whose device is late.
void closed_in_a_replay(Rank& self) {
  Device device;
  const size_t count = 1000;  // one block
  float* const data = device.copy_of(input_of<float>(self.rank, count, 0));
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  Graph graph(device, [&] { self.run(on(device, Kind::allreduce, data, data, {length(count)})); });
  device.put(data, input_of<float>(self.rank, count, 1));
  self.barrier();
  if (self.rank == 0) {
    require_cuda(cudaLaunchHostFunc(device.stream(), [](void*) { usleep(100'000); }, nullptr));
  }
  graph.launch();
  const cuda::Gpu& gpu = self.comm->core().accelerator()->gpu();
  while (self.rank != 0 && !gpu.report().under_way) std::this_thread::yield();
  self.comm->close();
  require_on_device(device, data, reduced<float>(Op::sum, self.size, count, 1), "at the end");
}

/// On a GPU each, in reach of each other; and on one GPU, where kernels of several processes do not
/// run at once.
void run_forks() {
  announce("processes", 3);
  fake_cuda::machine().devices = 3;
  const auto each = [](void (*body)(Rank&)) {
    return [body](Rank& self) {
      device_number = self.rank;
      body(self);
    };
  };
  run_processes(3, each([](Rank& self) { check_path(self, true); }));
  run_processes(3, each(collectives));
  run_processes(3, each(symmetric));
  run_processes(3, each(replays));
  run_processes(3, each(killed), 1);
  run_processes(3, each(closed_in_a_replay));
  fake_cuda::machine().peers = false;
  run_processes(2, each([](Rank& self) { check_path(self, false); }));
  run_processes(2, each(collectives));
  fake_cuda::machine() = {};
  run_processes(3, [](Rank& self) { check_path(self, false); });
  run_processes(3, collectives);
  run_processes(3, symmetric);
}

/// Ranks of several pretended hosts: through host memory, and over the network.
void run_across_hosts() {
  const std::vector<std::string> hosts = {"a", "b", "b"};
  announce("across hosts", 3);
  run_ranks(3, {}, [](Rank& self) { check_path(self, false); }, hosts);
  run_ranks(3, {}, collectives, hosts);
  run_ranks(3, {}, large, hosts);
  run_ranks(3, {}, asynchronous, hosts);
  run_ranks(3, {}, symmetric, hosts);
  run_ranks(3, {}, mismatches, hosts);
}

}  // namespace
}  // namespace ringreduce

int main() {
  alarm(ringreduce::limit_s);
  ringreduce::pin_to_two_cores();
  ringreduce::run_forks();  // first: a process that has used CUDA cannot fork
  for (const int size : {1, 2, 3}) ringreduce::run_threads(size);
  ringreduce::run_across_hosts();
}
