// The arithmetic of a block of threads: combine n arrays and store the result to any number of
// others, as reduce/reduce.h has it on the CPU and with the same bits. 16 bytes at a time where all
// arrays lie alike, else element by element. Knows nothing of ranks, flags or who waits.
//
// Operands say where the arrays are. They are asked again and again, which costs less than a table
// in each thread would:
//   sources(), source(r)   how many, and where the r-th one begins
//   targets(), target(t)
#pragma once

#include <cstdint>
#include <cstring>

#include "base/op.h"
#include "cuda/memory.cuh"
#include "reduce/elements.h"

namespace ringreduce::cuda {

/// Packs under way in each thread: `at_once` of each of `abreast` sources. Derived, not measured:
/// the memory of an H200 keeps busy with 4.8 TB/s x 0.8 us = 3.8 MB under way, 29 KB per
/// multiprocessor; 512 threads with 2 packs of 2 sources have 32 KB, of 4 sources 64 KB.
inline constexpr int abreast = 4;
inline constexpr int sums_at_once = 2;

template <class T>
inline constexpr bool is_complex = false;
template <class T>
inline constexpr bool is_complex<Complex<T>> = true;

template <class T>
inline constexpr int lanes = static_cast<int>(sizeof(Pack) / sizeof(T));

template <class Stored>
struct Lanes {
  Stored stored[lanes<Stored>];
};

template <class Stored>
__device__ inline Lanes<Stored> load_lanes(const char* array, size_t pack) {
  const Pack loaded = load_pack(array + pack * sizeof(Pack));
  Lanes<Stored> result;
  std::memcpy(&result, &loaded, sizeof(result));
  return result;
}

template <class Stored>
__device__ inline void store_lanes(char* array, size_t pack, const Lanes<Stored>& result) {
  Pack stored;
  std::memcpy(&stored, &result, sizeof(stored));
  store_pack(array + pack * sizeof(Pack), stored);
}

/// avg: the one division at the end. Elements that nobody averages are kept.
template <class Partial>
__device__ inline Partial finish(Partial value, int divisor) {
  if constexpr (std::is_arithmetic_v<Partial>) {
    if (divisor != 1) {
      return DivideBy<Partial>{static_cast<decltype(DivideBy<Partial>::size)>(divisor)}(value);
    }
  }
  return value;
}

/// visit(operation) with what a call does to elements of type Stored. Sums of complex numbers come
/// as sums of their parts.
template <class Stored, class Visit>
__device__ inline void with_operation(Op op, Visit visit) {
  if constexpr (std::is_same_v<Stored, Bool>) {
    if (op == Op::sum || op == Op::max) {
      visit(Or{});
    } else {
      visit(And{});
    }
  } else if constexpr (is_complex<Stored>) {
    visit(Prod{});
  } else if (op == Op::min) {
    visit(Min{});
  } else if (op == Op::max) {
    visit(Max{});
  } else if (op == Op::prod) {
    visit(Prod{});
  } else {
    visit(Sum{});
  }
}

template <class Stored>
__device__ inline PartialOf<Stored> apply(Op op, PartialOf<Stored> a, PartialOf<Stored> b) {
  PartialOf<Stored> result;
  with_operation<Stored>(op, [&](auto operation) { result = decltype(operation)::of(a, b); });
  return result;
}

/// Packs `first`, `first` + stride, ... of all arrays: `at_once` of them.
template <class Stored, class Operation, int at_once, class Operands>
__device__ inline void reduce_packs(const Operands& operands, size_t first, size_t stride,
                                    int divisor) {
  using Partial = PartialOf<Stored>;
  constexpr int n = lanes<Stored>;
  Partial values[at_once][n];
  const int sources = operands.sources();
#pragma unroll 1
  for (int begin = 0; begin < sources; begin += abreast) {
    Lanes<Stored> loaded[abreast][at_once];
#pragma unroll
    for (int r = 0; r < abreast; ++r) {
      if (begin + r >= sources) continue;
      const char* const array = operands.source(begin + r);
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        loaded[r][u] = load_lanes<Stored>(array, first + static_cast<size_t>(u) * stride);
      }
    }
#pragma unroll
    for (int r = 0; r < abreast; ++r) {
      if (begin + r >= sources) continue;
      const bool is_first = r == 0 && begin == 0;
#pragma unroll
      for (int i = 0; i < at_once * n; ++i) {
        const Partial value = widen(loaded[r][i / n].stored[i % n]);
        Partial& sum = values[i / n][i % n];
        sum = is_first ? value : Operation::of(sum, value);
      }
    }
  }
  Lanes<Stored> results[at_once];
#pragma unroll
  for (int i = 0; i < at_once * n; ++i) {
    results[i / n].stored[i % n] = narrow<Stored>(finish(values[i / n][i % n], divisor));
  }
  for (int t = 0; t < operands.targets(); ++t) {
    char* const array = operands.target(t);
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      store_lanes(array, first + static_cast<size_t>(u) * stride, results[u]);
    }
  }
}

template <class Stored, class Operation, class Operands>
__device__ inline void reduce_element(const Operands& operands, size_t index, int divisor) {
  const auto element = [&](int r) {
    return widen(reinterpret_cast<const Stored*>(operands.source(r))[index]);
  };
  PartialOf<Stored> value = element(0);
  const int sources = operands.sources();
  for (int r = 1; r < sources; ++r) value = Operation::of(value, element(r));
  const Stored result = narrow<Stored>(finish(value, divisor));
  for (int t = 0; t < operands.targets(); ++t) {
    reinterpret_cast<Stored*>(operands.target(t))[index] = result;
  }
}

/// How many bytes past a multiple of 16 all arrays begin; -1 if they differ in that.
template <class Operands>
__device__ inline int common_misalignment(const Operands& operands) {
  const auto of = [](const char* address) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(address) % sizeof(Pack));
  };
  const int first = of(operands.source(0));
  bool alike = true;
  for (int r = 1; r < operands.sources(); ++r) alike &= of(operands.source(r)) == first;
  for (int t = 0; t < operands.targets(); ++t) alike &= of(operands.target(t)) == first;
  return alike ? first : -1;
}

/// The same arrays from `offset_bytes` on.
template <class Operands>
struct Shifted {
  const Operands& operands;
  size_t offset_bytes;

  __device__ int sources() const { return operands.sources(); }
  __device__ int targets() const { return operands.targets(); }
  __device__ const char* source(int r) const { return operands.source(r) + offset_bytes; }
  __device__ char* target(int t) const { return operands.target(t) + offset_bytes; }
};
template <class Operands>
__device__ inline Shifted<Operands> shifted(const Operands& operands, size_t offset_bytes) {
  return {operands, offset_bytes};
}

/// Elements [0, count) of all arrays, by the threads of one block.
template <class Stored, class Operation, class Operands>
__device__ inline void reduce_as(const Operands& operands, size_t count, int divisor) {
  constexpr int at_once = std::is_same_v<Operation, Sum> ? sums_at_once : 1;
  const size_t thread = threadIdx.x, threads = blockDim.x;
  const int misalignment = common_misalignment(operands);
  const bool packed = misalignment >= 0 && misalignment % static_cast<int>(sizeof(Stored)) == 0;
  size_t head =
      packed ? (sizeof(Pack) - static_cast<size_t>(misalignment)) % sizeof(Pack) / sizeof(Stored)
             : count;
  if (head > count) head = count;
  const size_t packs = (count - head) / lanes<Stored>;
  const size_t tail = head + packs * lanes<Stored>;
#pragma unroll 1
  for (size_t index = thread; index < head; index += threads) {
    reduce_element<Stored, Operation>(operands, index, divisor);
  }
#pragma unroll 1
  for (size_t index = tail + thread; index < count; index += threads) {
    reduce_element<Stored, Operation>(operands, index, divisor);
  }
  const auto from_pack = shifted(operands, head * sizeof(Stored));
  size_t pack = thread;
#pragma unroll 1
  for (; pack + (at_once - 1) * threads < packs; pack += at_once * threads) {
    reduce_packs<Stored, Operation, at_once>(from_pack, pack, threads, divisor);
  }
#pragma unroll 1
  for (; pack < packs; pack += threads) {
    reduce_packs<Stored, Operation, 1>(from_pack, pack, threads, divisor);
  }
}

template <class Stored, class Operands>
__device__ inline void reduce_block(Op op, int size, const Operands& operands, size_t count) {
  with_operation<Stored>(op, [&](auto operation) {
    reduce_as<Stored, decltype(operation)>(operands, count, op == Op::avg ? size : 1);
  });
}

}  // namespace ringreduce::cuda
