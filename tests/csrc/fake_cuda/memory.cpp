// Memory of the fake: device memory lies in memfds, so that forked processes can open it as with
// CUDA IPC; a page before it counts who has. New memory holds rubbish.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "state.h"

namespace fake_cuda {
namespace {

constexpr size_t page_bytes = 4096;

enum class Kind { device, device_pool, opened, host, registered };

/// The page before device memory, seen by all processes that have opened it.
struct Lease {
  uint64_t id;
  std::atomic<int> opened;
};

struct Allocation {
  Kind kind;
  size_t size_bytes;
  int device;
  int fd = -1;
  Lease* lease = nullptr;
  int times_opened = 0;
};

struct Handle {
  uint64_t id, size_bytes;
  int pid, fd, device;
};
static_assert(sizeof(Handle) <= sizeof(cudaIpcMemHandle_t));

std::mutex mutex;
// By first byte. Leaked: threads may come here while the process ends.
auto& allocations = *new std::map<char*, Allocation>;

using Found = std::map<char*, Allocation>::iterator;

Found find(const void* memory) {
  char* const address = static_cast<char*>(const_cast<void*>(memory));
  auto found = allocations.upper_bound(address);
  if (found == allocations.begin()) return allocations.end();
  --found;
  return address < found->first + found->second.size_bytes ? found : allocations.end();
}

bool on_device(Kind kind) {
  return kind == Kind::device || kind == Kind::device_pool || kind == Kind::opened;
}

/// Whether `size_bytes` from here on are one allocation's, or none's at all, which is the host's.
bool in_bounds(const void* memory, size_t size_bytes) {
  const Found found = find(memory);
  if (found == allocations.end()) return true;
  return static_cast<const char*>(memory) + size_bytes <= found->first + found->second.size_bytes;
}

bool pageable(const void* memory) { return find(memory) == allocations.end(); }

uint64_t new_id() {
  static std::atomic<uint64_t> count{0};
  return static_cast<uint64_t>(getpid()) << 32 | ++count;
}

cudaError_t allocate(void** memory, size_t size_bytes, Kind kind) {
  *memory = nullptr;
  if (size_bytes == 0) return cudaSuccess;
  const int fd = memfd_create("fake_cuda", MFD_CLOEXEC);
  const size_t mapped_bytes = page_bytes + (size_bytes + page_bytes - 1) / page_bytes * page_bytes;
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(mapped_bytes)) != 0) {
    return cudaErrorMemoryAllocation;
  }
  void* const mapped = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) return cudaErrorMemoryAllocation;
  auto* const lease = new (mapped) Lease{new_id(), 0};
  char* const data = static_cast<char*>(mapped) + page_bytes;
  // Not all of a large one: it would have to be backed.
  std::memset(data, 0xa5, size_bytes < 65536 ? size_bytes : 65536);
  const std::lock_guard lock(mutex);
  allocations[data] = {kind, size_bytes, current_device(), fd, lease};
  *memory = data;
  return cudaSuccess;
}

void unmap(char* data, const Allocation& allocation) {
  const size_t rounded = (allocation.size_bytes + page_bytes - 1) / page_bytes * page_bytes;
  munmap(data - page_bytes, page_bytes + rounded);
  if (allocation.fd >= 0) close(allocation.fd);
}

cudaError_t release(void* memory, bool in_pool) {
  const std::lock_guard lock(mutex);
  const auto found = allocations.find(static_cast<char*>(memory));
  if (found == allocations.end()) return cudaErrorInvalidValue;
  const Allocation& allocation = found->second;
  if (allocation.kind != Kind::device && allocation.kind != Kind::device_pool) {
    return cudaErrorInvalidValue;
  }
  if (in_pool && allocation.kind == Kind::device) return cudaErrorInvalidValue;
  if (allocation.lease->opened.load() != 0) {
    fail("device memory is freed while another process has it open");
  }
  unmap(found->first, allocation);
  allocations.erase(found);
  return cudaSuccess;
}

}  // namespace

size_t num_streams() {
  const std::lock_guard lock(state().mutex);
  return state().streams.size();
}

size_t allocated_bytes() {
  const std::lock_guard lock(mutex);
  size_t total = 0;
  for (const auto& [data, allocation] : allocations) {
    if (allocation.kind == Kind::device) total += allocation.size_bytes;
  }
  return total;
}

}  // namespace fake_cuda

using namespace fake_cuda;

// ---- Allocation

cudaError_t cudaMalloc(void** memory, size_t size_bytes) {
  if (const cudaError_t error = usable()) return note(error);
  if (const cudaError_t error = allowed_in_capture()) return note(error);
  return note(allocate(memory, size_bytes, Kind::device));
}

/// Waits for the device, as CUDA's does.
cudaError_t cudaFree(void* memory) {
  if (const cudaError_t error = usable()) return note(error);
  if (!memory) return cudaSuccess;
  if (const cudaError_t error = allowed_in_capture()) return note(error);
  synchronize(current_device());
  return note(release(memory, false));
}

cudaError_t cudaMallocAsync(void** memory, size_t size_bytes, cudaStream_t) {
  if (const cudaError_t error = usable()) return note(error);
  return note(allocate(memory, size_bytes, Kind::device_pool));
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  if (const cudaError_t error = usable()) return note(error);
  return note(put(stream, [memory] {
    if (release(memory, true) != cudaSuccess) fail("cudaFreeAsync of what is not from its pool");
  }));
}

cudaError_t cudaHostAlloc(void** memory, size_t size_bytes, unsigned) {
  if (const cudaError_t error = usable()) return note(error);
  if (const cudaError_t error = allowed_in_capture()) return note(error);
  const size_t rounded = (size_bytes + page_bytes - 1) / page_bytes * page_bytes;
  *memory = std::aligned_alloc(page_bytes, rounded);
  std::memset(*memory, 0x5a, rounded);
  const std::lock_guard lock(mutex);
  allocations[static_cast<char*>(*memory)] = {Kind::host, size_bytes, current_device()};
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  if (const cudaError_t error = usable()) return note(error);
  if (!memory) return cudaSuccess;
  const std::lock_guard lock(mutex);
  const auto found = allocations.find(static_cast<char*>(memory));
  if (found == allocations.end() || found->second.kind != Kind::host) {
    return note(cudaErrorInvalidValue);
  }
  allocations.erase(found);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  const std::lock_guard lock(mutex);
  const Found found = find(host);
  if (found == allocations.end() || on_device(found->second.kind)) {
    return note(cudaErrorInvalidValue);
  }
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* memory, size_t size_bytes, unsigned) {
  if (const cudaError_t error = usable()) return note(error);
  if (const cudaError_t error = allowed_in_capture()) return note(error);
  if (size_bytes == 0) return note(cudaErrorInvalidValue);
  const std::lock_guard lock(mutex);
  if (find(memory) != allocations.end()) return note(cudaErrorHostMemoryAlreadyRegistered);
  allocations[static_cast<char*>(memory)] = {Kind::registered, size_bytes, current_device()};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* memory) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(mutex);
  const auto found = allocations.find(static_cast<char*>(memory));
  if (found == allocations.end() || found->second.kind != Kind::registered) {
    return note(cudaErrorHostMemoryNotRegistered);
  }
  allocations.erase(found);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(mutex);
  const Found found = find(memory);
  void* const address = const_cast<void*>(memory);
  if (found == allocations.end()) {
    *attributes = {cudaMemoryTypeUnregistered, -2, nullptr, address};
  } else if (on_device(found->second.kind)) {
    *attributes = {cudaMemoryTypeDevice, found->second.device, address, nullptr};
  } else {
    *attributes = {cudaMemoryTypeHost, found->second.device, address, address};
  }
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *total_bytes = size_t{8} << 30;
  *free_bytes = *total_bytes - allocated_bytes();
  return cudaSuccess;
}

// ---- Copies

/// What the host may change afterwards is copied now; what it may read at once has arrived.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size_bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (const cudaError_t error = usable()) return note(error);
  if (size_bytes == 0) return cudaSuccess;
  bool from_pageable, to_pageable;
  {
    const std::lock_guard lock(mutex);
    if (!in_bounds(to, size_bytes) || !in_bounds(from, size_bytes)) {
      return note(cudaErrorInvalidValue);
    }
    from_pageable = pageable(from);
    to_pageable = pageable(to);
  }
  cudaError_t error;
  if (from_pageable) {
    const auto* const bytes = static_cast<const char*>(from);
    error = put(stream, [to, staged = std::vector<char>(bytes, bytes + size_bytes)] {
      std::memcpy(to, staged.data(), staged.size());
    });
  } else {
    error = put(stream, [to, from, size_bytes] { std::memmove(to, from, size_bytes); });
  }
  if (error == cudaSuccess && to_pageable) error = cudaStreamSynchronize(stream);
  return note(error);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size_bytes, cudaMemcpyKind kind) {
  if (const cudaError_t error = usable()) return note(error);
  if (const cudaError_t error = allowed_in_capture()) return note(error);
  if (const cudaError_t error = cudaMemcpyAsync(to, from, size_bytes, kind, nullptr)) return error;
  return cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t size_bytes, cudaStream_t stream) {
  if (const cudaError_t error = usable()) return note(error);
  {
    const std::lock_guard lock(mutex);
    if (!in_bounds(memory, size_bytes) || pageable(memory)) return note(cudaErrorInvalidValue);
  }
  return note(put(stream, [memory, value, size_bytes] { std::memset(memory, value, size_bytes); }));
}

/// Returns before it is done, as CUDA's may.
cudaError_t cudaMemset(void* memory, int value, size_t size_bytes) {
  if (const cudaError_t error = allowed_in_capture()) return note(error);
  return cudaMemsetAsync(memory, value, size_bytes, nullptr);
}

// ---- Memory of other processes

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* memory) {
  if (const cudaError_t error = usable()) return note(error);
  if (const cudaError_t error = allowed_in_capture()) return note(error);
  const std::lock_guard lock(mutex);
  const Found found = find(memory);
  if (found == allocations.end() || found->second.kind != Kind::device) {
    return note(cudaErrorInvalidValue);
  }
  const Allocation& allocation = found->second;
  const Handle filled{allocation.lease->id, allocation.size_bytes, getpid(), allocation.fd,
                      allocation.device};
  std::memset(handle, 0, sizeof(*handle));
  std::memcpy(handle, &filled, sizeof(filled));
  return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void** memory, cudaIpcMemHandle_t handle, unsigned) {
  if (const cudaError_t error = usable()) return note(error);
  if (const cudaError_t error = allowed_in_capture()) return note(error);
  Handle filled;
  std::memcpy(&filled, &handle, sizeof(filled));
  if (filled.pid == getpid()) return note(cudaErrorInvalidResourceHandle);
  if (filled.device != current_device() && !machine().peers) {
    return note(cudaErrorPeerAccessUnsupported);
  }
  const std::lock_guard lock(mutex);
  for (auto& [data, allocation] : allocations) {
    if (allocation.kind != Kind::opened || allocation.lease->id != filled.id) continue;
    ++allocation.times_opened;
    *memory = data;
    return cudaSuccess;
  }
  const std::string path =
      "/proc/" + std::to_string(filled.pid) + "/fd/" + std::to_string(filled.fd);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return note(cudaErrorInvalidResourceHandle);
  const size_t rounded = (filled.size_bytes + page_bytes - 1) / page_bytes * page_bytes;
  void* const mapped = mmap(nullptr, page_bytes + rounded, PROT_READ | PROT_WRITE,
                            machine().loses_writes ? MAP_PRIVATE : MAP_SHARED, fd, 0);
  close(fd);
  if (mapped == MAP_FAILED) return note(cudaErrorMapBufferObjectFailed);
  auto* const lease = static_cast<Lease*>(mapped);
  if (lease->id != filled.id) {
    munmap(mapped, page_bytes + rounded);
    return note(cudaErrorInvalidResourceHandle);
  }
  ++lease->opened;
  char* const data = static_cast<char*>(mapped) + page_bytes;
  allocations[data] = {Kind::opened, filled.size_bytes, filled.device, -1, lease, 1};
  *memory = data;
  return cudaSuccess;
}

/// Waits for nobody: CUDA does not say that it does.
cudaError_t cudaIpcCloseMemHandle(void* memory) {
  if (const cudaError_t error = usable()) return note(error);
  const std::lock_guard lock(mutex);
  const auto found = allocations.find(static_cast<char*>(memory));
  if (found == allocations.end() || found->second.kind != Kind::opened) {
    return note(cudaErrorInvalidValue);
  }
  if (--found->second.times_opened > 0) return cudaSuccess;
  --found->second.lease->opened;
  unmap(found->first, found->second);
  allocations.erase(found);
  return cudaSuccess;
}
