// Copies by a block of threads: several at once, each from one place to one other. 16 bytes at a
// time where all places are aligned to that, else as many as their addresses allow.
#pragma once

#include <cstdint>

#include "cuda/memory.cuh"

namespace ringreduce::cuda {

/// Packs under way in each thread: with 512 of them 64 KB per multiprocessor (reduce.cuh has how
/// much it takes).
inline constexpr int copies_at_once = 8;

template <class Unit>
__device__ inline void copy_units(char* to, const char* from, size_t size_bytes) {
  const size_t units = size_bytes / sizeof(Unit);
#pragma unroll 1
  for (size_t i = threadIdx.x; i < units; i += blockDim.x) {
    reinterpret_cast<Unit*>(to)[i] = reinterpret_cast<const Unit*>(from)[i];
  }
}

/// Bytes [0, size_bytes), at any addresses that do not overlap, unless they are the same.
__device__ inline void copy_any(char* to, const char* from, size_t size_bytes) {
  const auto bits =
      reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | size_bytes;
  if (bits % 8 == 0) {
    copy_units<uint64_t>(to, from, size_bytes);
  } else if (bits % 4 == 0) {
    copy_units<uint32_t>(to, from, size_bytes);
  } else if (bits % 2 == 0) {
    copy_units<uint16_t>(to, from, size_bytes);
  } else {
    copy_units<uint8_t>(to, from, size_bytes);
  }
}

/// Moves are numbered from 0: moves.count() of them, number k from moves.from(k) to moves.to(k),
/// moves.size_bytes(k) <= moves.most_bytes().
template <class Moves>
__device__ inline void copy_all(const Moves& moves) {
  const int count = moves.count();
  bool aligned = true;
  for (int k = 0; k < count; ++k) {
    const auto bits = reinterpret_cast<uintptr_t>(moves.to(k)) |
                      reinterpret_cast<uintptr_t>(moves.from(k)) | moves.size_bytes(k);
    aligned &= bits % sizeof(Pack) == 0;
  }
  if (!aligned) {
    for (int k = 0; k < count; ++k) copy_any(moves.to(k), moves.from(k), moves.size_bytes(k));
    return;
  }
  // All packs of all moves are one row, of which a thread takes every blockDim-th.
  const size_t per_move = moves.most_bytes() / sizeof(Pack);
  size_t pack = threadIdx.x;
  int move = 0;
  const auto to_next_move = [&] {
    for (; move < count && pack >= per_move; ++move) pack -= per_move;
  };
  to_next_move();
  while (move < count) {
    Pack loaded[copies_at_once];
    char* to[copies_at_once];
#pragma unroll
    for (int u = 0; u < copies_at_once; ++u) {
      to[u] = nullptr;
      if (move >= count) continue;
      const size_t offset_bytes = pack * sizeof(Pack);
      if (offset_bytes < moves.size_bytes(move)) {
        loaded[u] = load_pack(moves.from(move) + offset_bytes);
        to[u] = moves.to(move) + offset_bytes;
      }
      pack += blockDim.x;
      to_next_move();
    }
#pragma unroll
    for (int u = 0; u < copies_at_once; ++u) {
      if (to[u]) store_pack(to[u], loaded[u]);
    }
  }
}

}  // namespace ringreduce::cuda
