// The ranks of tests of kernels: each a stream, a slab and a status of one process, all on one
// device. Uses nothing but CUDA's runtime, so it serves on a GPU as well as on the fake one.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/slab.h"
#include "reduce/reduce.h"

namespace ringreduce::cuda {

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::_Exit(1);
}

inline void require(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) fail(cudaGetErrorString(error));
}

/// Device memory of a test, between guards.
class Buffer {
 public:
  /// The first byte lies `skew_bytes` past a multiple of 256.
  explicit Buffer(size_t size_bytes, size_t skew_bytes = 0)
      : size_bytes_(size_bytes), skew_bytes_(skew_bytes) {
    std::vector<char*>& idle = idle_of(room());
    if (idle.empty()) {
      check(cudaMalloc(&base_, room()));
    } else {
      base_ = idle.back();
      idle.pop_back();
    }
    check(cudaMemset(base_, guard, size_bytes + skew_bytes + 2 * guard_bytes));
    check(cudaDeviceSynchronize());
  }
  ~Buffer() { idle_of(room()).push_back(base_); }
  Buffer(const Buffer&) = delete;

  char* data() const { return base_ + guard_bytes + skew_bytes_; }
  size_t size_bytes() const { return size_bytes_; }

  void fill(const std::vector<char>& bytes) {
    check(cudaMemcpy(data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  }
  std::vector<char> read() const {
    std::vector<char> bytes(size_bytes_);
    check(cudaMemcpy(bytes.data(), data(), bytes.size(), cudaMemcpyDeviceToHost));
    return bytes;
  }
  /// Whether what lies around it is as it was.
  bool guards_intact() const {
    std::vector<char> all(size_bytes_ + skew_bytes_ + 2 * guard_bytes);
    check(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < all.size(); ++i) {
      const bool inside =
          guard_bytes + skew_bytes_ <= i && i < guard_bytes + skew_bytes_ + size_bytes_;
      if (!inside && all[i] != guard) return false;
    }
    return true;
  }

 private:
  static constexpr size_t guard_bytes = 256;
  static constexpr char guard = 0x77;

  /// Memory is used again and again: to allocate takes longer than most tests.
  static std::vector<char*>& idle_of(size_t room_bytes) {
    static std::map<size_t, std::vector<char*>> idle;
    return idle[room_bytes];
  }
  size_t room() const { return std::bit_ceil(size_bytes_ + skew_bytes_ + 2 * guard_bytes); }

  size_t size_bytes_, skew_bytes_;
  char* base_ = nullptr;
};

/// One rank's end of a communicator.
struct KernelRank {
  cudaStream_t stream;
  char* slab;
  Status* status;       // as the host sees it
  Status* seen_status;  // as the device does
};

class KernelRanks {
 public:
  explicit KernelRanks(int size, bool wire = true) : most_(most_blocks(size)) {
    for (int rank = 0; rank < size; ++rank) {
      KernelRank made{};
      check(cudaStreamCreateWithFlags(&made.stream, cudaStreamNonBlocking));
      check(cudaMalloc(&made.slab, slab_bytes(size, wire)));
      check(cudaMemset(made.slab, 0, slab_bytes(size, wire)));
      check(cudaHostAlloc(&made.status, sizeof(Status), cudaHostAllocMapped));
      std::memset(static_cast<void*>(made.status), 0, sizeof(Status));
      check(cudaHostGetDevicePointer(&made.seen_status, made.status, 0));
      ranks_.push_back(made);
    }
    check(cudaDeviceSynchronize());
  }
  ~KernelRanks() {
    for (KernelRank& rank : ranks_) {
      check(cudaStreamSynchronize(rank.stream));
      check(cudaStreamDestroy(rank.stream));
      check(cudaFree(rank.slab));
      check(cudaFreeHost(rank.status));
    }
  }
  KernelRanks(const KernelRanks&) = delete;

  int size() const { return static_cast<int>(ranks_.size()); }
  KernelRank& operator[](int rank) { return ranks_[static_cast<size_t>(rank)]; }

  /// A call of every rank, to be completed with the message.
  std::vector<DeviceCall> calls(Dtype dtype, Op op, size_t count) const {
    std::vector<DeviceCall> made(ranks_.size());
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      DeviceCall& call = made[rank];
      call = {};
      call.rank = static_cast<int>(rank);
      call.size = size();
      call.dtype = dtype;
      call.op = op;
      call.digest = 0x12345678;
      call.timeout_ns = uint64_t{20} * 1000000000;
      call.status = ranks_[rank].seen_status;
      for (size_t peer = 0; peer < ranks_.size(); ++peer) call.slabs[peer] = ranks_[peer].slab;
      call.count = count;
      call.reduces = call.gathers = true;
      call.division = Division::even;
    }
    return made;
  }

  /// Each rank's on its own stream; does not wait.
  void launch(Kernel kernel, const std::vector<DeviceCall>& calls) {
    for (size_t rank = 0; rank < ranks_.size(); ++rank) launch(kernel, calls[rank]);
  }
  void launch(Kernel kernel, const DeviceCall& call) {
    cuda::launch(kernel, call, blocks_of(kernel, call, most_),
                 ranks_[static_cast<size_t>(call.rank)].stream);
  }
  void wait() {
    for (KernelRank& rank : ranks_) check(cudaStreamSynchronize(rank.stream));
  }
  void require_no_trouble(const std::string& what) {
    for (KernelRank& rank : ranks_) {
      require(rank.status->trouble == 0, what + ": trouble " +
                                             std::to_string(rank.status->trouble) + " with rank " +
                                             std::to_string(rank.status->peer));
      require(rank.status->begun == rank.status->left, what + ": a kernel is still under way");
    }
  }

 private:
  int most_;
  std::vector<KernelRank> ranks_;
};

}  // namespace ringreduce::cuda
