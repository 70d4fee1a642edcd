#include "comm/accelerator.h"

#include <thread>

#include "base/thread.h"
#include "comm/collective.h"
#include "comm/communicator.h"

namespace ringreduce {
namespace {

// Of the watcher: how soon kernels hear of an abort.
constexpr auto period = std::chrono::milliseconds(10);
// A kernel that still waits for a rank this long after the rank's last kernel has ended waits in
// vain.
constexpr int64_t in_vain_ns = 1'000'000'000;
// A rank that has departed and says nothing for so long has ended. What it may still have mapped is
// left to the driver.
constexpr int64_t end_limit_ns = 10'000'000'000;

/// A block of device memory. Freed by nobody while peers may have it mapped: only when all ranks
/// drop its segment together, or by the driver when the process ends.
class DeviceMemory : public Memory {
 public:
  explicit DeviceMemory(char* data) { data_ = data; }
};

Exchange exchange_of(Node& node, Deadline deadline) {
  return [&node, deadline](const std::string& message) { return node.exchange(message, deadline); };
}

}  // namespace

Accelerator::Accelerator(Core& core, int device, Deadline deadline, const Interrupted& interrupted)
    : device(device), arena_(std::make_shared<Arena>()) {
  if (core.cluster) {
    open_everywhere(core, deadline, interrupted);
  } else {
    open(core, deadline);
  }
}

Accelerator::~Accelerator() = default;

/// Collective over a node. Throws ErrorCode::resource on all its ranks.
void Accelerator::open(Core& core, Deadline deadline) {
  const bool across = core.cluster != nullptr;
  cuda::Gpu::Options options;
  options.rank = core.node.local_rank();
  options.size = core.node.local_size();
  options.device = device;
  options.in_process = core.options.in_process;
  options.wire = core.tuner.needs_wire();
  options.other_nodes = across && (options.wire || !core.cluster->takes_device_memory());
  options.timeout_s = core.options.timeout_s;
  gpu_ = cuda::Gpu::open(options, exchange_of(core.node, deadline));
  why_host_ = across ? "the ranks are on several nodes" : gpu_->why_host();
  if (kernels()) return;
  staging_ = core.arena->allocate(core.node, staging_bytes, deadline);
  gpu_->pin(staging(), staging_bytes);
}

/// All nodes fail with one, and go the same way: the least of what ranks can do.
void Accelerator::open_everywhere(Core& core, Deadline deadline, const Interrupted& interrupted) {
  enum Way : uint8_t { none, host, directly };
  Way way = host;
  std::string failure = "another host could not set its GPUs up";
  try {
    open(core, deadline);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::resource) throw;
    way = none;
    failure = error.what();
  }
  if (way == host && gpu_->why_host().empty()) {
    try {
      direct_ = std::make_unique<Direct>(*core.cluster, core.group, *gpu_, device);
      way = directly;
    } catch (const Error&) {
      // There is no memory for it.
    }
  }
  const uint8_t all = least_of_all(core, way, interrupted);
  if (direct_ && all != directly) {
    direct_->free();
    direct_.reset();
  }
  if (all == none) {
    if (gpu_) close_gpu(core, deadline);
    throw Error(ErrorCode::resource, failure);
  }
  if (direct_) direct_->open();
}

/// Collective over a node. Nothing has been enqueued.
void Accelerator::close_gpu(Core& core, Deadline deadline) {
  if (staging_) gpu_->unpin(staging());
  gpu_->close_peers();
  exchange_of(core.node, deadline)("");
  gpu_->free_own();
}

void Accelerator::start(const std::shared_ptr<Core>& core) {
  start_thread([this, core] { watch(*core); });
}

std::shared_ptr<Block> Accelerator::allocate(Core& core, size_t size_bytes, Deadline deadline) {
  const std::unique_lock<std::mutex> used = use();
  const Exchange exchange = exchange_of(core.node, deadline);
  Arena::Segments segments;
  segments.create = [&](size_t pool_bytes) {
    const cuda::Shared shared = gpu_->share(pool_bytes, exchange);
    Segment segment{shared.size_bytes, {}};
    for (char* block : shared.blocks) {
      segment.blocks.push_back(std::make_shared<DeviceMemory>(block));
    }
    return segment;
  };
  segments.drop = [&](const Segment& segment) {
    // Its owners are done with it; what they had enqueued before may not be.
    if (!drain(deadline, {})) throw Error(ErrorCode::timeout, "the device does not come to an end");
    cuda::Shared shared{segment.size_bytes, {}};
    for (const auto& block : segment.blocks) shared.blocks.push_back(block->data());
    gpu_->release(shared, exchange);
  };
  return arena_->allocate(core.node, size_bytes, deadline, segments);
}

char* Accelerator::pinned(size_t size_bytes) {
  if (size_bytes > own_pinned_bytes_) {
    if (own_pinned_) gpu_->unpin(own_pinned_.get());
    own_pinned_bytes_ = 0;
    own_pinned_.reset(new char[size_bytes]);
    gpu_->pin(own_pinned_.get(), size_bytes);
    own_pinned_bytes_ = size_bytes;
  }
  return own_pinned_.get();
}

bool Accelerator::drain(Deadline deadline, const Interrupted& interrupted) {
  while (!gpu_->idle()) {
    if (deadline.passed(now_ns()) || (interrupted && interrupted())) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

std::unique_lock<std::mutex> Accelerator::use() {
  std::unique_lock used(used_);
  const std::lock_guard lock(mutex_);
  if (closing_) throw Error(ErrorCode::closed, "the communicator is closed");
  return used;
}

void Accelerator::close() {
  std::lock_guard lock(mutex_);
  closing_ = true;
  changed_.notify_all();
}

/// False once the communicator is closed.
bool Accelerator::rest() {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, period, [this] { return closing_; });
  return !closing_;
}

void Accelerator::watch(Core& core) {
  try {
    cuda::settle(device);
    while (rest()) look(core);
    tear_down(core);
  } catch (const Error&) {
    // The device failed, or the driver is being unloaded: what is left is the driver's.
  }
}

/// What kernels have to know goes down, what they have found comes up.
void Accelerator::look(Core& core) {
  Group& group = core.group;
  if (const std::optional<AbortRecord> dead = group.find_dead()) group.abort(*dead);
  const cuda::Gpu::Report report = gpu_->report();
  const auto rank = [&] { return group.number_of(report.peer); };
  if (report.trouble == cuda::Trouble::timeout) {
    group.abort(
        ErrorCode::timeout, rank(),
        "a kernel of this rank has waited in vain for one of " + group.describe(report.peer));
  } else if (report.trouble == cuda::Trouble::mismatch) {
    group.abort(ErrorCode::mismatch, rank(),
                "a CUDA graph of this rank and one of " + group.describe(report.peer) +
                    " replay different collectives");
  }
  look_for_departed(core, report.under_way);
  if (group.aborted()) gpu_->abort();
}

/// A rank that has left in good order, while a kernel here waits for one of its: replays of a graph
/// are not known to the host.
void Accelerator::look_for_departed(Core& core, bool under_way) {
  int gone = -1;
  for (int peer = 0; under_way && peer < core.group.size(); ++peer) {
    if (peer != core.group.rank() && stage_of(core, peer) != Stage::working) gone = peer;
  }
  const int64_t now = now_ns();
  if (gone == -1) {
    alone_since_ns_ = 0;
  } else if (alone_since_ns_ == 0) {
    alone_since_ns_ = now;
  } else if (now - alone_since_ns_ > in_vain_ns) {
    core.group.abort(ErrorCode::peer_failed, core.group.number_of(gone),
                     core.group.describe(gone) + " exited while a kernel waits for it");
  }
}

Accelerator::Stage Accelerator::stage_of(const Core& core, int peer) {
  return static_cast<Stage>(core.group.control(peer).gpu.load(std::memory_order_acquire));
}

void Accelerator::tear_down(Core& core) {
  const std::lock_guard used(used_);  // a collective that began before close() has ended
  // Twice in a row: of a replayed graph's kernel only the first block tells when it leaves.
  for (int seen_idle = 0; seen_idle < 2; seen_idle = gpu_->idle() ? seen_idle + 1 : 0) {
    look(core);
    std::this_thread::sleep_for(period);
  }
  if (staging_) gpu_->unpin(staging());
  if (own_pinned_) gpu_->unpin(own_pinned_.get());
  if (direct_ && core.cluster->device_rail_closed()) direct_->free();
  if (!all_reach(core, Stage::idle)) return;
  gpu_->close_peers();
  if (!all_reach(core, Stage::unmapped)) return;
  gpu_->free_own();
}

/// Says that this rank is so far, and waits for the others. False: not all will come.
bool Accelerator::all_reach(Core& core, Stage stage) {
  core.group.own().gpu.store(static_cast<uint32_t>(stage), std::memory_order_release);
  for (int peer = 0; peer < core.group.size(); ++peer) {
    const RankControl& other = core.group.control(peer);
    int64_t gone_since_ns = 0;
    while (stage_of(core, peer) < stage && !core.group.dead(peer)) {
      if (other.departed.load(std::memory_order_acquire) != 0) {
        if (gone_since_ns == 0) gone_since_ns = now_ns();
        if (now_ns() - gone_since_ns > end_limit_ns) return false;
      }
      std::this_thread::sleep_for(period);
    }
  }
  return true;
}

}  // namespace ringreduce
