// How kernels touch memory that other ranks' kernels touch at the same time: the only PTX of the
// project. Names follow the memory model of PTX: "relaxed" and "acquire"/"release" are of scope
// .sys, which spans all GPUs and the host; weak accesses are for data that such flags guard.
#pragma once

#include <cstdint>

namespace ringreduce::cuda {

/// What one thread moves at a time. 16-byte aligned in memory.
struct alignas(16) Pack {
  uint32_t words[4];
};

// Past the first-level cache: what peers wrote is read once. Never through the read-only path
// (ld.nc), which need not see what was written since the kernel began.
__device__ inline Pack load_pack(const void* from) {
  Pack pack;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
               : "l"(from)
               : "memory");
  return pack;
}

__device__ inline void store_pack(void* to, Pack pack) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(pack.words[0]),
               "r"(pack.words[1]), "r"(pack.words[2]), "r"(pack.words[3])
               : "memory");
}

__device__ inline uint64_t load_relaxed(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

__device__ inline uint32_t load_relaxed(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ inline uint64_t load_acquire(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

__device__ inline void store_relaxed(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

__device__ inline void store_relaxed(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

/// A fence of scope .sys, and then the store. The fence is cumulative: it also covers what other
/// threads of the block wrote before the __syncthreads that this thread has passed.
__device__ inline void store_release(uint64_t* to, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

/// Two words side by side, each of which arrives whole; the two may arrive apart.
struct alignas(16) Line {
  uint64_t words[2];
};

__device__ inline Line load_line(const Line* from) {
  Line line;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(line.words[0]), "=l"(line.words[1])
               : "l"(from)
               : "memory");
  return line;
}

__device__ inline void store_line(Line* to, Line line) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(line.words[0]),
               "l"(line.words[1])
               : "memory");
}

/// Of a clock that all threads of the device share.
__device__ inline uint64_t clock_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

/// Between two looks at a word that has not come.
__device__ inline void pause() {}

}  // namespace ringreduce::cuda
