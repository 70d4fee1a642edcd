// GPU memory that crosses nodes without the host's: for an MPI that says it is CUDA-aware, which is
// handed addresses of the device. Inside a node its kernels sum up and gather, across nodes every
// rail is a ring (BlueConnect, as in hierarchical.h) whose slots lie on the GPU and whose sums are
// kernels. MPI sees these slots only, never a tensor, so what it has to do once for an address it
// does once. Large allreduces only; what is small, and all else, is left to the host.
//
// Phases follow each other without overlap. By cost.h, of 1 GB between two hosts of eight GPUs,
// with 450 GB/s inside and 50 GB/s across for each: 3.9 ms inside and 2.5 ms across, of which an
// overlap would hide the smaller. What this stands in for has every rank copy all of its message
// over PCIe twice and sum up at a CPU's 12 GB/s: 146 ms. On a network of 10 Gbit/s both take as
// long as that does. Nothing here was measured.
//
// After an abort nothing is taken back: kernels that are under way end by themselves or are told
// to, MPI may write to the slots until it ends, and so they are never freed then.
#pragma once

#include <vector>

#include "comm/cluster.h"
#include "cuda/gpu.h"

namespace ringreduce {

class Direct : public WireDevice {
 public:
  /// For a cluster that takes device memory, on a GPU whose kernels reach all others of the node.
  /// Throws ErrorCode::resource.
  Direct(Cluster& cluster, const Group& group, cuda::Gpu& gpu, int device);
  /// Once all ranks have said that they go this way.
  void open() { cluster_.open_device_rail(*this); }
  /// When nobody uses it any more, and the GPU is idle.
  void free();

  /// Of `ranks` ranks in all. What `call` says of the message and its digest; the same `chunk`, in
  /// elements, on all ranks. Returns when this rank has nothing more to send or to receive; what is
  /// left is enqueued. False: stopped.
  bool allreduce(const cuda::DeviceCall& call, int ranks, size_t chunk, void* stream, Watch& watch);

  char* slots(size_t size_bytes) override;
  void reduce(const Reduction& reduction, std::span<const Target> targets,
              std::span<const Source> sources, size_t count) override;
  void copy(void* to, const void* from, size_t size_bytes) override;
  bool finish(Watch& watch) override;

 private:
  // Sums of 16-bit floats inside a node, as float32: room for so much of a message at once.
  static constexpr size_t widened_bytes = size_t{32} << 20;
  static constexpr size_t fifo_bytes = Links::num_slots * NetWire::device_slot_bytes;
  static constexpr size_t memory_bytes = widened_bytes + 2 * fifo_bytes;

  bool reduce_segment(const cuda::DeviceCall& call, int ranks, size_t chunk, Watch& watch);
  void sum_inside(const cuda::DeviceCall& call, Chunk mine, Message& message);
  void launch_inside(cuda::DeviceCall call);

  Cluster& cluster_;
  const Group& group_;
  cuda::Gpu& gpu_;
  const int device_;
  char* const memory_;
  size_t used_bytes_ = widened_bytes;  // what slots() has not given away comes after
  void* stream_ = nullptr;             // of the call under way
};

/// Until the device has come there. False: stopped.
bool wait_for_device(cuda::Event& event, Watch& watch);

}  // namespace ringreduce
