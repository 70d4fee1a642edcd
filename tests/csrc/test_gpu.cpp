// Collectives on GPU memory from the Communicator down, on a pretended GPU: every kind by kernels
// and through host memory, ranks as threads and as processes, operations that overlap, symmetric
// memory, mismatches, and ranks that fail. The kernels alone are in test_kernels.cpp.
#include <cuda_runtime.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "comm/accelerator.h"
#include "elements.h"
#include "fake_cuda.h"

namespace ringreduce {
namespace {

void require_cuda(cudaError_t error) { require(error == cudaSuccess, cudaGetErrorString(error)); }

/// The device of this rank's tensors.
thread_local int device_number = 0;

/// Device memory that nobody uses any more. Freeing it waits for all kernels of the process; those
/// of the other ranks may wait for this one's next.
class Graveyard {
 public:
  void add(const std::vector<void*>& blocks) {
    std::lock_guard lock(mutex_);
    blocks_.insert(blocks_.end(), blocks.begin(), blocks.end());
  }
  /// No rank is at work.
  void clear() {
    for (void* block : blocks_) require_cuda(cudaFree(block));
    blocks_.clear();
  }

 private:
  std::mutex mutex_;
  std::vector<void*> blocks_;
} graveyard;

/// A stream of one rank, and memory.
class Device {
 public:
  Device() {
    require_cuda(cudaSetDevice(device_number));
    require_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~Device() {
    require_cuda(cudaStreamSynchronize(stream_));
    graveyard.add(blocks_);
    require_cuda(cudaStreamDestroy(stream_));
  }
  cudaStream_t stream() const { return stream_; }

  template <class T>
  T* empty(size_t count) {
    void* data = nullptr;
    require_cuda(cudaMalloc(&data, std::max<size_t>(count, 1) * sizeof(T)));
    blocks_.push_back(data);
    return static_cast<T*>(data);
  }
  template <class T>
  void put(T* to, const std::vector<T>& values) {
    require_cuda(
        cudaMemcpyAsync(to, values.data(), values.size() * sizeof(T), cudaMemcpyDefault, stream_));
    synchronize();
  }
  template <class T>
  T* copy_of(const std::vector<T>& values) {
    T* data = empty<T>(values.size());
    put(data, values);
    return data;
  }
  /// After all that the stream was given.
  template <class T>
  std::vector<T> get(const T* from, size_t count) {
    std::vector<T> values(count);
    require_cuda(
        cudaMemcpyAsync(values.data(), from, count * sizeof(T), cudaMemcpyDefault, stream_));
    synchronize();
    return values;
  }
  void synchronize() { require_cuda(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
  std::vector<void*> blocks_;
};

template <class T>
Call on(Device& device, Kind kind, const T* input, T* output, std::vector<int64_t> shape,
        Op op = Op::sum, int root = 0) {
  Call call = call_of(kind, input, output, std::move(shape), op, root);
  call.device = device_number;
  call.stream = device.stream();
  return call;
}

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

/// A graph of several calls, replayed with new values.
void replays(Rank& self) {
  Device device;
  const size_t count = 70'001;
  float* const data = device.copy_of(input_of<float>(self.rank, count, 0));
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  device.synchronize();
  self.barrier();
  require_cuda(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal));
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  self.start(on(device, Kind::allreduce, data, data, {100}, Op::max));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  require_cuda(cudaStreamEndCapture(device.stream(), &graph));
  require_cuda(cudaGraphInstantiate(&executable, graph, 0));
  for (int salt = 0; salt < 5; ++salt) {
    device.put(data, input_of<float>(self.rank, count, salt));
    self.dawdle();
    require_cuda(cudaGraphLaunch(executable, device.stream()));
    require_on_device(device, data, reduced<float>(Op::sum, self.size, count, salt), "a replay");
  }
  require_cuda(cudaGraphExecDestroy(executable));
  require_cuda(cudaGraphDestroy(graph));
}

/// Rank 0 gives up while the kernels of the others wait for its: they leave, and their hosts say
/// who it was.
void abandoned(Rank& self) {
  if (self.size == 1) return;
  Device device;
  const size_t count = 3000;
  float* const data = device.copy_of(input_of<float>(self.rank, count, 0));
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  require_cuda(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal));
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  require_cuda(cudaStreamEndCapture(device.stream(), &graph));
  require_cuda(cudaGraphInstantiate(&executable, graph, 0));
  self.barrier();
  if (self.rank == 0) {
    self.comm->abort("rank 0 has had enough");
  } else {
    require_cuda(cudaGraphLaunch(executable, device.stream()));
    device.synchronize();
    const std::string text = error_of(ErrorCode::peer_failed, [&] { self.comm->check(); });
    require_in("rank 0 has had enough", text);
    error_of(ErrorCode::peer_failed, [&] { self.barrier(); });
  }
  require_cuda(cudaGraphExecDestroy(executable));
  require_cuda(cudaGraphDestroy(graph));
}

/// The same, but rank 0 leaves in good order.
void departed(Rank& self) {
  if (self.size == 1) return;
  Device device;
  float* const data = device.copy_of(input_of<float>(self.rank, 3000, 0));
  self.run(on(device, Kind::allreduce, data, data, {3000}));
  device.synchronize();
  require_cuda(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal));
  self.run(on(device, Kind::allreduce, data, data, {3000}));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  require_cuda(cudaStreamEndCapture(device.stream(), &graph));
  require_cuda(cudaGraphInstantiate(&executable, graph, 0));
  if (self.rank == 0) {
    self.comm->close();
  } else {
    require_cuda(cudaGraphLaunch(executable, device.stream()));
    device.synchronize();
    require_in("exited while a kernel waits",
               error_of(ErrorCode::peer_failed, [&] { self.comm->check(); }));
  }
  require_cuda(cudaGraphExecDestroy(executable));
  require_cuda(cudaGraphDestroy(graph));
}

void check_path(Rank& self, bool kernels) {
  Device device;
  float* const data = device.copy_of(input_of<float>(self.rank, 10, 0));
  self.run(on(device, Kind::allreduce, data, data, {10}));
  const std::shared_ptr<Accelerator> open = self.comm->core().accelerator();
  require(open->kernels() == kernels, "the other path was taken: " + open->gpu().why_host());
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

/// An allgather of small messages among forked processes.
class ProcessExchange {
 public:
  explicit ProcessExchange(int size) : size_(size) {
    const size_t bytes = sizeof(Shared) + static_cast<size_t>(size) * sizeof(Slot);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    require(memory != MAP_FAILED, "no shared memory");
    shared_ = static_cast<Shared*>(memory);
    pthread_barrierattr_t shared;
    pthread_barrierattr_init(&shared);
    pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&shared_->barrier, &shared, static_cast<unsigned>(size));
  }

  std::vector<std::string> operator()(int rank, const std::string& message) {
    Slot* slots = reinterpret_cast<Slot*>(shared_ + 1);
    require(message.size() <= sizeof(Slot::text), "a message too long for the test");
    slots[rank].length = message.size();
    message.copy(slots[rank].text, message.size());
    pthread_barrier_wait(&shared_->barrier);
    std::vector<std::string> all;
    for (int peer = 0; peer < size_; ++peer) {
      all.emplace_back(slots[peer].text, slots[peer].length);
    }
    pthread_barrier_wait(&shared_->barrier);
    return all;
  }

 private:
  struct Shared {
    pthread_barrier_t barrier;
  };
  struct Slot {
    size_t length;
    char text[8192];
  };
  int size_;
  Shared* shared_ = nullptr;
};

/// body(rank) in forked processes, which have not touched the device before. A rank that should die
/// is not asked how it ended.
void run_processes(int size, const std::function<void(Rank&)>& body, int dies = -1) {
  ProcessExchange exchange(size);
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    std::fflush(stdout);
    const pid_t child = fork();
    require(child >= 0, "cannot fork");
    if (child > 0) {
      children.push_back(child);
      continue;
    }
    alarm(limit_s);
    try {
      Rank self{rank, size, {}, {}, {}, std::mt19937(static_cast<unsigned>(rank)), {}};
      self.exchange = [&exchange, rank](const std::string& text) { return exchange(rank, text); };
      self.comm = self.open();
      body(self);
      self.comm->close();
    } catch (const std::exception& error) {
      fail("process " + std::to_string(rank) + " of " + std::to_string(size) + ": " + error.what());
    }
    std::_Exit(0);
  }
  for (int rank = 0; rank < size; ++rank) {
    int status = 0;
    waitpid(children[static_cast<size_t>(rank)], &status, 0);
    require(rank == dies || (WIFEXITED(status) && WEXITSTATUS(status) == 0),
            "process " + std::to_string(rank) + " failed");
  }
}

/// A rank is killed while the kernels of the others wait for its.
void killed(Rank& self) {
  Device device;
  float* const data = device.copy_of(input_of<float>(self.rank, 3000, 0));
  self.run(on(device, Kind::allreduce, data, data, {3000}));
  require_cuda(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal));
  self.run(on(device, Kind::allreduce, data, data, {3000}));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  require_cuda(cudaStreamEndCapture(device.stream(), &graph));
  require_cuda(cudaGraphInstantiate(&executable, graph, 0));
  self.barrier();
  if (self.rank == 1) raise(SIGKILL);
  require_cuda(cudaGraphLaunch(executable, device.stream()));
  device.synchronize();
  const std::string text = error_of(ErrorCode::peer_failed, [&] { self.comm->check(); });
  require_in("rank 1", text);
  require_in("died", text);
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
