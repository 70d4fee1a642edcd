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

/// Symmetric tensors. A block's slice is read from all inputs and stored to all outputs by this
/// block alone, and by each thread only where it has read before: so an output may be an input.
/// Others may read and write here from `met` on until all have published `left`.
template <class Stored>
class TwoShotWindow {
 public:
  __device__ TwoShotWindow(Team& team, const DeviceCall& call) : team_(team), call_(call) {}

  /// What the kernels before this one have written into the input, is there for everybody.
  __device__ bool arrive() {
    team_.announce();
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

/// Any tensors. Every rank sends its input to all others' inboxes, as lines that each say of which
/// call they are: a line is there when it says so, and no fence and no second meeting is needed.
/// The lines of a call lie apart from those of the call before; they are written again in the call
/// after the next, which a rank begins when it has seen all others arrive in the next one, hence
/// has seen them leave this one.
template <class Stored>
class OneShotWindow {
 public:
  __device__ OneShotWindow(Team& team, const DeviceCall& call) : team_(team), call_(call) {}

  /// With the arrival first, on which everybody waits first.
  __device__ void share_input(Chunk all) {
    team_.announce();
    if (team_.stopped()) return;
    const uint64_t number = uint64_t{team_.number()} << 32;
    for_each_unit(all, [&](size_t unit, int length) {
      const uint64_t data = load_unit(unit, length);
      const Line line{{number | static_cast<uint32_t>(data), number | data >> 32}};
      for (int peer = 0; peer < call_.size; ++peer) {
        if (peer != call_.rank) store_line(box(peer, call_.rank) + unit, line);
      }
    });
  }

  __device__ bool arrive() { return team_.met(); }

  /// A unit of the output is written by the thread that has read it from the input, and after that:
  /// so the output may be the input.
  __device__ void reduce_to_self(Chunk all) {
    bool good = true;
    for_each_unit(all, [&](size_t unit, int length) { good = good && reduce_unit(unit, length); });
    team_.agree(good);
  }

 private:
  static constexpr int unit_length = static_cast<int>(line_data_bytes / sizeof(Stored));
  static constexpr int lines_at_once = 8;
  struct Unit {
    Stored stored[unit_length];
  };

  /// visit(unit, elements of it that exist)
  template <class Visit>
  __device__ void for_each_unit(Chunk all, Visit visit) const {
    const size_t stride = size_t{gridDim.x} * blockDim.x;
#pragma unroll 1
    for (size_t unit = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
         unit * unit_length < all.length; unit += stride) {
      const size_t left = all.length - unit * unit_length;
      visit(unit, left < unit_length ? static_cast<int>(left) : unit_length);
    }
  }

  __device__ Line* box(int at, int from) const {
    return reinterpret_cast<Line*>(team_.slab(at).lines(team_.parity(), from, call_.size));
  }

  __device__ uint64_t load_unit(size_t unit, int length) const {
    const Stored* const input = reinterpret_cast<const Stored*>(call_.input) + unit * unit_length;
    Unit loaded{};
#pragma unroll
    for (int i = 0; i < unit_length; ++i) {
      if (i < length) loaded.stored[i] = input[i];
    }
    uint64_t data;
    std::memcpy(&data, &loaded, sizeof(data));
    return data;
  }

  /// The same lines of ranks [first, first + lines_at_once), as far as there are so many.
  __device__ bool fetch(Line (&lines)[lines_at_once], size_t unit, int first) {
    Patience patience(call_);
    for (;;) {
      int missing = -1;
#pragma unroll
      for (int r = 0; r < lines_at_once; ++r) {
        const int peer = first + r;
        if (peer >= call_.size || peer == call_.rank) continue;
        lines[r] = load_line(box(call_.rank, peer) + unit);
      }
#pragma unroll
      for (int r = 0; r < lines_at_once; ++r) {
        const int peer = first + r;
        if (peer >= call_.size || peer == call_.rank) continue;
        const bool whole =
            lines[r].words[0] >> 32 == team_.number() && lines[r].words[1] >> 32 == team_.number();
        if (!whole) missing = peer;
      }
      if (missing == -1) return true;
      if (!team_.go_on(patience, missing)) return false;
    }
  }

  __device__ bool reduce_unit(size_t unit, int length) {
    const uint64_t own = load_unit(unit, length);
    PartialOf<Stored> values[unit_length] = {};
#pragma unroll 1
    for (int first = 0; first < call_.size; first += lines_at_once) {
      Line lines[lines_at_once];
      if (!fetch(lines, unit, first)) return false;
#pragma unroll
      for (int r = 0; r < lines_at_once; ++r) {
        const int peer = first + r;
        if (peer >= call_.size) continue;
        const uint64_t sent = (lines[r].words[0] & 0xffffffff) | lines[r].words[1] << 32;
        combine(values, peer == call_.rank ? own : sent, peer == 0);
      }
    }
    Stored* const output = reinterpret_cast<Stored*>(call_.output) + unit * unit_length;
    const int divisor = call_.op == Op::avg ? call_.size : 1;
#pragma unroll
    for (int i = 0; i < unit_length; ++i) {
      if (i < length) output[i] = narrow<Stored>(finish(values[i], divisor));
    }
    return true;
  }

  __device__ void combine(PartialOf<Stored> (&values)[unit_length], uint64_t data,
                          bool is_first) const {
    Unit unit;
    std::memcpy(&unit, &data, sizeof(unit));
#pragma unroll
    for (int i = 0; i < unit_length; ++i) {
      const PartialOf<Stored> value = widen(unit.stored[i]);
      values[i] = is_first ? value : apply<Stored>(call_.op, values[i], value);
    }
  }

  Team& team_;
  const DeviceCall& call_;
};

}  // namespace ringreduce::cuda
