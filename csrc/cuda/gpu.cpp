#include "cuda/gpu.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

#include "cuda/device_memory.h"
#include "cuda/runtime.h"

namespace ringreduce::cuda {
namespace {

/// A kernel of the set-up's check waits for its peers so long.
constexpr double check_timeout_s = 5;
constexpr size_t check_count = 4099;  // several blocks, and a rest

/// What each rank tells the others of itself, or of memory that it lends.
struct Introduction {
  char uuid[16];
  int device;
  pid_t pid;
};
struct Lent {
  char* address;
  cudaIpcMemHandle_t handle;
};

template <class T>
std::vector<T> exchange_all(const Exchange& exchange, const T& mine) {
  std::vector<T> all;
  for (const std::string& text :
       exchange(std::string(reinterpret_cast<const char*>(&mine), sizeof(T)))) {
    T theirs{};
    if (text.size() != sizeof(T)) {
      throw Error(ErrorCode::resource, "ranks of different versions of ringreduce");
    }
    std::memcpy(&theirs, text.data(), sizeof(T));
    all.push_back(theirs);
  }
  return all;
}

/// The first rank's trouble, the same on all ranks; empty if nobody has any.
std::string first_trouble(const Exchange& exchange, const std::string& mine) {
  const std::vector<std::string> all = exchange(mine);
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (!all[rank].empty()) return "local rank " + std::to_string(rank) + ": " + all[rank];
  }
  return "";
}

/// Handles of streams that are gone come back; and one stands for a stream of each thread.
unsigned long long id_of(void* stream) {
  unsigned long long id = 0;
  require(cudaStreamGetId(as_stream(stream), &id), "no such stream");
  return id;
}

/// What `attempt` throws, as text.
template <class Attempt>
std::string trouble_of(Attempt attempt) {
  try {
    attempt();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

class CudaGpu : public Gpu {
 public:
  CudaGpu(const Options& options, const Exchange& exchange) : options_(options) {
    const std::string trouble = first_trouble(exchange, trouble_of([&] { set_up(); }));
    if (!trouble.empty()) {
      if (side_stream_) free_own();
      throw Error(ErrorCode::resource, trouble);
    }
    why_host_ = find_path(exchange);
    if (!why_host_.empty()) return;
    why_host_ = check_path(exchange);
  }

  const std::string& why_host() const override { return why_host_; }
  size_t slab_bytes() const override { return slab_.size_bytes; }
  int blocks() const override { return blocks_; }
  void* side_stream() override { return side_stream_; }

  void begin(void* stream) override {
    if (!last_event_ || capturing(stream)) return;
    const OnDevice on(options_.device);
    if (id_of(stream) == last_stream_) return;
    require(cudaStreamWaitEvent(as_stream(stream), last_event_, 0), "a stream cannot wait");
  }

  /// What a graph under construction holds is ordered when it is replayed, by whoever does that.
  void end(void* stream) override {
    if (capturing(stream)) return;
    const OnDevice on(options_.device);
    if (!last_event_) {
      require(cudaEventCreateWithFlags(&last_event_, cudaEventDisableTiming), "no event");
    }
    require(cudaEventRecord(last_event_, as_stream(stream)), "cannot record an event");
    last_stream_ = id_of(stream);
  }

  void launch(Kernel kernel, DeviceCall& call, void* stream) override {
    launch_within(kernel, call, stream, options_.timeout_s);
  }

  void copy(void* to, const void* from, size_t size_bytes, void* stream) override {
    const OnDevice on(options_.device);
    require(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDefault, as_stream(stream)),
            "cannot copy");
  }

  void pin(char* data, size_t size_bytes) override {
    const OnDevice on(options_.device);
    if (cudaHostRegister(data, size_bytes, cudaHostRegisterPortable) != cudaSuccess) {
      cudaGetLastError();
    }
  }
  void unpin(char* data) override {
    const OnDevice on(options_.device);
    if (cudaHostUnregister(data) != cudaSuccess) cudaGetLastError();
  }

  Shared share(size_t size_bytes, const Exchange& exchange) override {
    Shared shared{size_bytes, std::vector<char*>(static_cast<size_t>(options_.size))};
    char*& own = shared.blocks[static_cast<size_t>(options_.rank)];
    const std::string no_memory = first_trouble(exchange, trouble_of([&] {
                                                  const OnDevice on(options_.device);
                                                  own = allocate_on_device(size_bytes);
                                                }));
    if (!no_memory.empty()) {
      free_block(shared);
      throw Error(ErrorCode::resource, no_memory);
    }
    if (!why_host_.empty() || options_.size == 1) return shared;
    const std::string trouble = lend(shared, exchange);
    if (!trouble.empty()) {
      release(shared, exchange);
      throw Error(ErrorCode::resource, trouble);
    }
    return shared;
  }

  void release(const Shared& shared, const Exchange& exchange) override {
    unmap(shared);
    exchange("");
    free_block(shared);
  }

  char* allocate(size_t size_bytes) override {
    const OnDevice on(options_.device);
    return allocate_on_device(size_bytes);
  }
  void free(char* data, size_t size_bytes) override {
    const OnDevice on(options_.device);
    free_on_device(data, size_bytes, options_.in_process);
  }

  /// Where kernels carry nothing, what the check of the path has found is no trouble.
  Report report() const override {
    if (!status_ || !why_host_.empty()) return {};
    const auto load = [](uint32_t& word) {
      return std::atomic_ref<uint32_t>(word).load(std::memory_order_acquire);
    };
    Report report;
    report.trouble = static_cast<Trouble>(load(status_->trouble));
    report.peer = static_cast<int>(load(status_->peer));
    const uint32_t left = load(status_->left);  // first: else what begins meanwhile seems to run
    report.under_way = load(status_->begun) != left;
    return report;
  }

  void abort() override {
    if (!status_) return;
    std::atomic_ref<uint32_t>(status_->abort).store(1, std::memory_order_release);
  }

  bool idle() override {
    if (last_event_) {
      const OnDevice on(options_.device);
      const Unrecorded unrecorded;
      const cudaError_t error = cudaEventQuery(last_event_);
      if (error == cudaErrorNotReady) cudaGetLastError();
      if (error != cudaSuccess) return error != cudaErrorNotReady;  // a device that failed is idle
    }
    return !report().under_way;  // a replay of a graph, of which no event here knows
  }

  void close_peers() override { unmap(slab_); }

  void free_own() override {
    const OnDevice on(options_.device);
    free_block(slab_);
    if (last_event_) cudaEventDestroy(last_event_);
    if (side_stream_) cudaStreamDestroy(side_stream_);
    // As with memory of the device, freeing would wait for the kernels of other ranks here.
    if (status_ && !options_.in_process) cudaFreeHost(status_);
    slab_ = {};
    last_event_ = nullptr;
    side_stream_ = nullptr;
    status_ = nullptr;
  }

 private:
  void set_up() {
    int devices = 0;
    require(cudaGetDeviceCount(&devices), "no device");
    if (options_.device >= devices) {
      throw Error(ErrorCode::resource,
                  "there is no device cuda:" + std::to_string(options_.device));
    }
    const OnDevice on(options_.device);
    int least = 0, greatest = 0;
    require(cudaDeviceGetStreamPriorityRange(&least, &greatest), "no stream priorities");
    require(cudaStreamCreateWithPriority(&side_stream_, cudaStreamNonBlocking, greatest),
            "cannot make a stream");
    void* status = nullptr;
    require(cudaHostAlloc(&status, sizeof(Status), cudaHostAllocPortable | cudaHostAllocMapped),
            "no pinned memory");
    status_ = new (status) Status{};
    require(cudaHostGetDevicePointer(&status, status_, 0), "pinned memory is out of reach");
    device_status_ = static_cast<Status*>(status);
    cudaDeviceProp properties;
    require(cudaGetDeviceProperties(&properties, options_.device), "no device properties");
    static_assert(sizeof(properties.uuid) == sizeof(self_.uuid));
    std::memcpy(self_.uuid, &properties.uuid, sizeof(self_.uuid));
    self_.device = options_.device;
    self_.pid = getpid();
  }

  /// Why kernels cannot reach all ranks, the same text on all of them; if they can, the slabs are
  /// there.
  std::string find_path(const Exchange& exchange) {
    const std::vector<Introduction> ranks = exchange_all(exchange, self_);
    int most_sharers = 1;
    for (const Introduction& one : ranks) {
      most_sharers = std::max(
          most_sharers,
          static_cast<int>(std::count_if(ranks.begin(), ranks.end(), [&](const auto& other) {
            return std::memcmp(one.uuid, other.uuid, sizeof(one.uuid)) == 0;
          })));
    }
    if (options_.other_nodes) return "the ranks are on several nodes";
    if (options_.size > max_ranks) return "more ranks than kernels can join";
    if (most_sharers > 1 && !options_.in_process) return "processes share a GPU";
    for (const Introduction& one : ranks) devices_.push_back(one.device);
    std::string trouble = first_trouble(exchange, trouble_of([&] { prepare(most_sharers); }));
    if (!trouble.empty()) return trouble;
    for (const std::string& theirs : exchange(std::to_string(blocks_))) {
      blocks_ = std::min(blocks_, std::stoi(theirs));
    }
    return lend(slab_, exchange);
  }

  /// This rank's slab, empty.
  void prepare(int most_sharers) {
    const OnDevice on(options_.device);
    blocks_ = most_blocks(most_sharers);
    if (blocks_ == 0) throw Error(ErrorCode::resource, "too many ranks on one GPU");
    check_offset_bytes_ = cuda::slab_bytes(options_.size, options_.wire);
    slab_.size_bytes = check_offset_bytes_ + check_count * sizeof(int32_t);
    slab_.blocks.resize(static_cast<size_t>(options_.size));
    char*& own = slab_.blocks[static_cast<size_t>(options_.rank)];
    own = allocate_on_device(slab_.size_bytes);
    require(cudaMemsetAsync(own, 0, slab_.size_bytes, side_stream_), "cannot clear memory");
    require(cudaStreamSynchronize(side_stream_), "the device failed");
  }

  /// Every rank's own block becomes visible to all. What went wrong; on all ranks, if on one.
  std::string lend(Shared& shared, const Exchange& exchange) {
    const auto me = static_cast<size_t>(options_.rank);
    Lent mine{shared.blocks[me], {}};
    std::string trouble = trouble_of([&] {
      const OnDevice on(options_.device);
      if (options_.in_process || options_.size == 1) return;
      require(cudaIpcGetMemHandle(&mine.handle, mine.address), "memory cannot be lent");
    });
    const std::vector<Lent> lent = exchange_all(exchange, mine);
    for (size_t peer = 0; peer < lent.size() && trouble.empty(); ++peer) {
      if (peer == me) continue;
      trouble = trouble_of([&] { shared.blocks[peer] = map(peer, lent[peer]); });
    }
    return first_trouble(exchange, trouble);
  }

  char* map(size_t peer, const Lent& lent) {
    const OnDevice on(options_.device);
    if (!options_.in_process) {
      void* mapped = nullptr;
      require(cudaIpcOpenMemHandle(&mapped, lent.handle, cudaIpcMemLazyEnablePeerAccess),
              "a peer's memory cannot be mapped");
      return static_cast<char*>(mapped);
    }
    if (devices_[peer] == options_.device) return lent.address;
    int reachable = 0;
    require(cudaDeviceCanAccessPeer(&reachable, options_.device, devices_[peer]), "no such peer");
    if (!reachable) throw Error(ErrorCode::resource, "no peer access between the GPUs");
    const cudaError_t error = cudaDeviceEnablePeerAccess(devices_[peer], 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();
    } else {
      require(error, "no peer access");
    }
    return lent.address;
  }

  void unmap(const Shared& shared) {
    if (options_.in_process) return;
    const OnDevice on(options_.device);
    for (size_t peer = 0; peer < shared.blocks.size(); ++peer) {
      if (static_cast<int>(peer) == options_.rank || !shared.blocks[peer]) continue;
      if (cudaIpcCloseMemHandle(shared.blocks[peer]) != cudaSuccess) cudaGetLastError();
    }
  }

  void free_block(const Shared& shared) {
    if (shared.blocks.empty()) return;
    const OnDevice on(options_.device);
    char* own = shared.blocks[static_cast<size_t>(options_.rank)];
    free_on_device(own, shared.size_bytes, options_.in_process);
  }

  /// One real allreduce of known numbers: drivers say that peers are in reach, and yet what is
  /// written there may not arrive (an IOMMU in between, ACS).
  std::string check_path(const Exchange& exchange) {
    // All have come here, so that nobody's kernel waits long for the others'.
    const std::string trouble = first_trouble(exchange, trouble_of([&] { check_sum(); }));
    if (trouble.empty()) return "";
    return "kernels do not reach the peers' memory (" + trouble +
           "); on bare metal, PCIe ACS or an IOMMU may be in the way";
  }

  void check_sum() {
    const OnDevice on(options_.device);
    char* const data = slab_.blocks[static_cast<size_t>(options_.rank)] + check_offset_bytes_;
    std::vector<int32_t> values(check_count);
    for (size_t i = 0; i < check_count; ++i) values[i] = options_.rank + static_cast<int>(i);
    const size_t size_bytes = check_count * sizeof(int32_t);
    copy(data, values.data(), size_bytes, side_stream_);
    DeviceCall call{};
    call.dtype = Dtype::i32;
    call.op = Op::sum;
    call.count = check_count;
    call.input = call.output = data;
    call.reduces = call.gathers = true;
    begin(side_stream_);
    launch_within(Kernel::staged, call, side_stream_, check_timeout_s);
    end(side_stream_);
    copy(values.data(), data, size_bytes, side_stream_);
    require(cudaStreamSynchronize(side_stream_), "the device failed");
    if (report().trouble != Trouble::none) {
      throw Error(ErrorCode::resource,
                  "nothing came from local rank " + std::to_string(report().peer));
    }
    const int size = options_.size;
    for (size_t i = 0; i < check_count; ++i) {
      if (values[i] != size * (size - 1) / 2 + size * static_cast<int>(i)) {
        throw Error(ErrorCode::resource, "wrong data came from the peers");
      }
    }
  }

  void launch_within(Kernel kernel, DeviceCall& call, void* stream, double timeout_s) {
    const OnDevice on(options_.device);
    call.rank = options_.rank;
    call.size = options_.size;
    call.timeout_ns = static_cast<uint64_t>(std::min(timeout_s, 1e9) * 1e9);
    call.status = device_status_;
    std::copy(slab_.blocks.begin(), slab_.blocks.end(), call.slabs);
    cuda::launch(kernel, call, blocks_of(kernel, call, blocks_), stream);
  }

  const Options options_;
  Introduction self_{};
  std::vector<int> devices_;  // by rank
  std::string why_host_;
  int blocks_ = 0;
  Shared slab_;
  size_t check_offset_bytes_ = 0;    // in the slab: numbers for the check of the path
  Status* status_ = nullptr;         // as the host sees it
  Status* device_status_ = nullptr;  // as the device does
  cudaStream_t side_stream_ = nullptr;
  unsigned long long last_stream_ = 0;  // where the last call was enqueued, and when it ends
  cudaEvent_t last_event_ = nullptr;
};

}  // namespace

std::unique_ptr<Gpu> Gpu::open(const Options& options, const Exchange& exchange) {
  return std::make_unique<CudaGpu>(options, exchange);
}

}  // namespace ringreduce::cuda
