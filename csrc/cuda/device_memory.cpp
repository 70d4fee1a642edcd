#include "cuda/device_memory.h"

#include <map>
#include <mutex>

#include "cuda/runtime.h"

namespace ringreduce::cuda {
namespace {

/// What has been kept, by device and size.
struct Kept {
  std::mutex mutex;
  std::multimap<std::pair<int, size_t>, char*> blocks;
};

Kept& kept() {
  static auto* kept = new Kept;  // leaked: threads may come here while the process ends
  return *kept;
}

int current_device() {
  int device = 0;
  require(cudaGetDevice(&device), "no current device");
  return device;
}

}  // namespace

char* allocate_on_device(size_t size_bytes) {
  {
    std::lock_guard lock(kept().mutex);
    const auto block = kept().blocks.find({current_device(), size_bytes});
    if (block != kept().blocks.end()) {
      char* const data = block->second;
      kept().blocks.erase(block);
      return data;
    }
  }
  void* data = nullptr;
  require(cudaMalloc(&data, size_bytes), "no memory");
  return static_cast<char*>(data);
}

void free_on_device(char* data, size_t size_bytes, bool for_reuse) {
  if (data == nullptr) return;
  if (for_reuse) {
    std::lock_guard lock(kept().mutex);
    kept().blocks.insert({{current_device(), size_bytes}, data});
  } else if (cudaFree(data) != cudaSuccess) {
    cudaGetLastError();
  }
}

}  // namespace ringreduce::cuda
