// The Windows of kernels: what one_shot.h and two_shot.h run on when the memory of all ranks can be
// reached. The message is cut among the blocks of all ranks' kernels, so no two of them write the
// same element.
#pragma once

#include "base/chunk.h"
#include "base/dtype.h"
#include "cuda/reduce.cuh"
#include "cuda/slab.h"
#include "cuda/team.cuh"

namespace ringreduce::cuda {

/// Where cuts are made: no two blocks then write to one line of 128 bytes, if tensors begin at one.
RR_HOST_DEVICE constexpr size_t granule_of(size_t item_bytes) {
  return staging_granule_bytes / item_bytes;
}

/// Symmetric tensors. A block's slice is read from all inputs and stored to all outputs by this
/// block alone, and by each thread only where it has read before: so an output may be an input.
/// Others may read and write here from `met` on until all have published `left`.
template <class Stored>
class TwoShotWindow {
 public:
  __device__ TwoShotWindow(Team& team, const DeviceCall& call) : team_(team), call_(call) {}

  /// What the kernels before this one have written into the input, is there for everybody.
  __device__ bool arrive() {
    team_.announce_prepared();
    return team_.met();
  }

  __device__ bool next_slice(Chunk& slice) {
    if (taken_ || team_.stopped()) return false;
    taken_ = true;
    const int workers = call_.size * team_.blocks();
    const Blocks slices = Blocks::even(call_.count, workers, granule_of(sizeof(Stored)));
    slice = slices[call_.rank * team_.blocks() + team_.block()];
    return true;
  }

  __device__ void reduce_to_all(Chunk slice) {
    const Operands operands{call_, slice.offset * sizeof(Stored)};
    reduce_block<Stored>(call_.op, call_.size, operands, slice.length);
  }

  __device__ void done() {
    team_.publish(Step::left, 1);
    team_.wait(Step::left, 1);
  }

 private:
  struct Operands {
    const DeviceCall& call;
    size_t offset_bytes;

    __device__ int sources() const { return call.size; }
    __device__ int targets() const { return call.size; }
    __device__ const char* source(int r) const { return call.inputs[r] + offset_bytes; }
    __device__ char* target(int t) const { return call.outputs[t] + offset_bytes; }
  };

  Team& team_;
  const DeviceCall& call_;
  bool taken_ = false;
};

}  // namespace ringreduce::cuda
