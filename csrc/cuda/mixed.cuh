// The arithmetic of a Wire, by a block of threads: at most two arrays of partial sums and this
// rank's own input, in this order, become partial sums to pass on, or the finished result. And a
// copy to several places. Partial sums lie in slots; only the tensors may lie askew.
#pragma once

#include "cuda/reduce.cuh"

namespace ringreduce::cuda {

struct Mixed {
  const char* partials[2] = {};
  const char* own = nullptr;
  char* targets[3] = {};
  int num_partials = 0, num_targets = 0;
};

/// n elements of an array: one pack or, of wide elements, several.
template <class T, int n>
struct Several {
  static constexpr size_t packs = n * sizeof(T) / sizeof(Pack);
  T elements[n];

  __device__ void load(const char* array, size_t index) {
    Pack loaded[packs];
#pragma unroll
    for (size_t i = 0; i < packs; ++i) {
      loaded[i] = load_pack(array + (index * packs + i) * sizeof(Pack));
    }
    std::memcpy(&elements, &loaded, sizeof(elements));
  }
  __device__ void store(char* array, size_t index) const {
    Pack stored[packs];
    std::memcpy(&stored, &elements, sizeof(elements));
#pragma unroll
    for (size_t i = 0; i < packs; ++i) {
      store_pack(array + (index * packs + i) * sizeof(Pack), stored[i]);
    }
  }
};

template <class Stored, bool finished>
using MixedResult = std::conditional_t<finished, Stored, PartialOf<Stored>>;

template <class Stored, bool finished>
__device__ inline MixedResult<Stored, finished> mixed_result(PartialOf<Stored> value, int divisor) {
  if constexpr (finished) {
    return narrow<Stored>(finish(value, divisor));
  } else {
    return value;
  }
}

/// Packs `first`, `first` + blockDim, ... of own elements, and what belongs to them: `at_once`.
template <class Stored, class Operation, bool finished, int at_once>
__device__ inline void reduce_mixed_packs(const Mixed& mixed, size_t first, int divisor) {
  using Partial = PartialOf<Stored>;
  constexpr int n = lanes<Stored>;
  Several<Partial, n> partials[2][at_once];
  Several<Stored, n> own[at_once];
#pragma unroll
  for (int u = 0; u < at_once; ++u) {
    const size_t pack = first + static_cast<size_t>(u) * blockDim.x;
    own[u].load(mixed.own, pack);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r < mixed.num_partials) partials[r][u].load(mixed.partials[r], pack);
    }
  }
#pragma unroll
  for (int u = 0; u < at_once; ++u) {
    Several<MixedResult<Stored, finished>, n> results;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      Partial value = widen(own[u].elements[i]);
      if (mixed.num_partials > 0) {
        Partial sum = partials[0][u].elements[i];
        if (mixed.num_partials > 1) sum = Operation::of(sum, partials[1][u].elements[i]);
        value = Operation::of(sum, value);
      }
      results.elements[i] = mixed_result<Stored, finished>(value, divisor);
    }
#pragma unroll
    for (int t = 0; t < 3; ++t) {
      if (t >= mixed.num_targets) continue;
      results.store(mixed.targets[t], first + static_cast<size_t>(u) * blockDim.x);
    }
  }
}

template <class Stored, class Operation, bool finished>
__device__ inline void reduce_mixed_element(const Mixed& mixed, size_t index, int divisor) {
  using Partial = PartialOf<Stored>;
  Partial value = widen(reinterpret_cast<const Stored*>(mixed.own)[index]);
  if (mixed.num_partials > 0) {
    Partial sum = reinterpret_cast<const Partial*>(mixed.partials[0])[index];
    if (mixed.num_partials > 1) {
      sum = Operation::of(sum, reinterpret_cast<const Partial*>(mixed.partials[1])[index]);
    }
    value = Operation::of(sum, value);
  }
  using Result = MixedResult<Stored, finished>;
  const Result result = mixed_result<Stored, finished>(value, divisor);
  for (int t = 0; t < mixed.num_targets; ++t) {
    reinterpret_cast<Result*>(mixed.targets[t])[index] = result;
  }
}

/// Elements [0, count).
template <class Stored, bool finished>
__device__ inline void reduce_mixed(Op op, int divisor, const Mixed& mixed, size_t count) {
  auto bits = reinterpret_cast<uintptr_t>(mixed.own);
  for (int t = 0; t < mixed.num_targets; ++t) bits |= reinterpret_cast<uintptr_t>(mixed.targets[t]);
  const size_t packs = bits % sizeof(Pack) == 0 ? count / lanes<Stored> : 0;
  // What registers allow: 4 packs of a type of 4 bytes spilled.
  constexpr int at_once = lanes<Stored> > 8 ? 1 : 2;
  with_operation<Stored>(op, [&](auto operation) {
    using Operation = decltype(operation);
    size_t pack = threadIdx.x;
    const size_t threads = blockDim.x;
#pragma unroll 1
    for (; pack + (at_once - 1) * threads < packs; pack += at_once * threads) {
      reduce_mixed_packs<Stored, Operation, finished, at_once>(mixed, pack, divisor);
    }
#pragma unroll 1
    for (; pack < packs; pack += threads) {
      reduce_mixed_packs<Stored, Operation, finished, 1>(mixed, pack, divisor);
    }
#pragma unroll 1
    for (size_t index = packs * lanes<Stored> + threadIdx.x; index < count; index += threads) {
      reduce_mixed_element<Stored, Operation, finished>(mixed, index, divisor);
    }
  });
}

/// Elements [0, count) from a slot to all targets.
template <class Stored>
__device__ inline void copy_to_all(const char* from, const Mixed& to, size_t count) {
  constexpr size_t at_once = 4;
  const size_t threads = blockDim.x;
  uintptr_t bits = 0;
  for (int t = 0; t < to.num_targets; ++t) bits |= reinterpret_cast<uintptr_t>(to.targets[t]);
  const size_t packs = bits % sizeof(Pack) == 0 ? count / lanes<Stored> : 0;
#pragma unroll 1
  for (size_t pack = threadIdx.x; pack < packs; pack += at_once * threads) {
    Pack loaded[at_once];
#pragma unroll
    for (size_t u = 0; u < at_once; ++u) {
      const size_t at = pack + u * threads;
      if (at < packs) loaded[u] = load_pack(from + at * sizeof(Pack));
    }
    for (int t = 0; t < to.num_targets; ++t) {
#pragma unroll
      for (size_t u = 0; u < at_once; ++u) {
        const size_t at = pack + u * threads;
        if (at < packs) store_pack(to.targets[t] + at * sizeof(Pack), loaded[u]);
      }
    }
  }
#pragma unroll 1
  for (size_t i = packs * lanes<Stored> + threadIdx.x; i < count; i += threads) {
    const Stored element = reinterpret_cast<const Stored*>(from)[i];
    for (int t = 0; t < to.num_targets; ++t) reinterpret_cast<Stored*>(to.targets[t])[i] = element;
  }
}

}  // namespace ringreduce::cuda
