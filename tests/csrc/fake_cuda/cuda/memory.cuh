// In place of csrc/cuda/memory.cuh where kernels run on the CPU: the same accesses as atomics of
// the same order, so that ThreadSanitizer judges what guards what. Weak accesses stay plain.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_runtime.h"

namespace ringreduce::cuda {

struct alignas(16) Pack {
  uint32_t words[4];
};

/// What the hardware answers with a fault that no later call survives.
inline void require_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  std::fprintf(stderr, "FAILED: a misaligned access in a kernel, %p to %zu bytes\n", address,
               bytes);
  std::_Exit(1);
}

inline Pack load_pack(const void* from) {
  require_aligned(from, sizeof(Pack));
  Pack pack;
  std::memcpy(&pack, from, sizeof(pack));
  return pack;
}

inline void store_pack(void* to, Pack pack) {
  require_aligned(to, sizeof(pack));
  std::memcpy(to, &pack, sizeof(pack));
}

template <class Word>
Word load_as(const Word* from, std::memory_order order) {
  require_aligned(from, sizeof(Word));
  return std::atomic_ref(*const_cast<Word*>(from)).load(order);
}

template <class Word>
void store_as(Word* to, Word value, std::memory_order order) {
  require_aligned(to, sizeof(Word));
  std::atomic_ref(*to).store(value, order);
}

inline uint64_t load_relaxed(const uint64_t* from) {
  return load_as(from, std::memory_order_relaxed);
}
inline uint32_t load_relaxed(const uint32_t* from) {
  return load_as(from, std::memory_order_relaxed);
}
inline uint64_t load_acquire(const uint64_t* from) {
  return load_as(from, std::memory_order_acquire);
}
inline void store_relaxed(uint64_t* to, uint64_t value) {
  store_as(to, value, std::memory_order_relaxed);
}
inline void store_relaxed(uint32_t* to, uint32_t value) {
  store_as(to, value, std::memory_order_relaxed);
}
inline void store_release(uint64_t* to, uint64_t value) {
  store_as(to, value, std::memory_order_release);
}

struct alignas(16) Line {
  uint64_t words[2];
};

// The second word first: nobody may rely on the order.
inline Line load_line(const Line* from) {
  require_aligned(from, sizeof(Line));
  Line line;
  line.words[1] = load_relaxed(&from->words[1]);
  line.words[0] = load_relaxed(&from->words[0]);
  return line;
}

inline void store_line(Line* to, Line line) {
  require_aligned(to, sizeof(Line));
  store_relaxed(&to->words[0], line.words[0]);
  fake_cuda::yield_sometimes();
  store_relaxed(&to->words[1], line.words[1]);
}

inline uint64_t clock_ns() { return fake_cuda::clock_ns(); }

inline void pause() { fake_cuda::yield(); }

}  // namespace ringreduce::cuda
