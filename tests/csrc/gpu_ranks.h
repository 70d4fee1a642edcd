// Ranks with memory on a pretended GPU, as threads (ranks.h) or as processes.
#pragma once

#include <cuda_runtime.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <string>
#include <vector>

#include "comm/accelerator.h"
#include "elements.h"
#include "fake_cuda.h"

namespace ringreduce {

inline void require_cuda(cudaError_t error) {
  require(error == cudaSuccess, cudaGetErrorString(error));
}

/// The device of this rank's tensors.
inline thread_local int device_number = 0;

/// Device memory that nobody uses any more. Freeing it waits for all kernels of the process; those
/// of the other ranks may wait for this one's next.
inline class Graveyard {
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

inline void check_path(Rank& self, bool kernels) {
  Device device;
  float* const data = device.copy_of(input_of<float>(self.rank, 10, 0));
  self.run(on(device, Kind::allreduce, data, data, {10}));
  const std::shared_ptr<Accelerator> open = self.comm->core().accelerator();
  require(open->kernels() == kernels, "the other path was taken: " + open->gpu().why_host());
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
inline void run_processes(int size, const std::function<void(Rank&)>& body, int dies = -1) {
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

}  // namespace ringreduce
