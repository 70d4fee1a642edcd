// What a test tells the fake CUDA runtime, and what the fake's own parts tell each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fake_cuda {

// ---- For tests. Before the first CUDA call, or between two; the same in forked processes.

struct Machine {
  // Overridden by the environment: FAKE_CUDA_DEVICES, FAKE_CUDA_NO_PEERS, FAKE_CUDA_PROCESSORS.
  int devices = 1;
  bool peers = true;          // devices reach each other
  bool loses_writes = false;  // ... or seem to: processes do not see what others write
  int processors = 8;         // per device; each holds one block at a time
  unsigned uuid_seed = 0;     // devices of equal seed and number have equal UUIDs
  unsigned most_threads = 8;  // blocks have no more than this, whatever the launch says
};
Machine& machine();

/// Delays operations of streams by random times below this. 0: not at all. At first what
/// FAKE_CUDA_DELAY_US says.
void set_most_delay_us(unsigned most_us);

/// Whether a thread of this process has made itself at home on a device.
bool used(int device);

/// What cudaMalloc gives and nobody has freed, in bytes, in this process.
size_t allocated_bytes();

/// Streams that were made and nobody has destroyed, in this process.
size_t num_streams();

/// What a stream has been given and not begun.
size_t num_queued(void* stream);

// ---- Inside kernels

/// All threads of the block come here before any goes on. Whether one of them came with `value`.
int meet(bool value, const char* file, int line);
/// Others go on first.
void yield();
/// Now and then, to part what might otherwise always be seen together.
void yield_sometimes();
uint64_t clock_ns();

// ---- Inside the fake

/// Something is wrong that real hardware would not forgive.
[[noreturn]] void fail(const std::string& what);

}  // namespace fake_cuda
