// What a communicator has more of once it has seen GPU memory: the GPU itself, symmetric memory on
// it, host memory for what neither kernels nor MPI can carry from there, and a thread that watches.
// Kernels wait for each other where no host thread looks on; so the watcher tells them of aborts
// and deaths, and the ranks of what kernels have found.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>

#include "comm/arena.h"
#include "comm/direct.h"
#include "comm/work.h"
#include "cuda/gpu.h"

namespace ringreduce {

struct Core;

class Accelerator {
 public:
  /// Collective over all ranks, which have met.
  Accelerator(Core& core, int device, Deadline deadline, const Interrupted& interrupted);
  ~Accelerator();
  /// Starts the watcher, which holds the core until the end.
  void start(const std::shared_ptr<Core>& core);

  const int device;
  cuda::Gpu& gpu() const { return *gpu_; }
  /// Whether kernels alone carry the data.
  bool kernels() const { return why_host_.empty(); }
  /// Why they do not; the host then has its part in every collective.
  const std::string& why_host() const { return why_host_; }
  /// What carries large allreduces across nodes; null: host memory.
  Direct* direct() const { return direct_.get(); }
  const std::shared_ptr<Arena>& arena() const { return arena_; }
  /// Collective.
  std::shared_ptr<Block> allocate(Core& core, size_t size_bytes, Deadline deadline);

  /// Of the host path: symmetric memory on the host, pinned. Every rank has the same number of
  /// bytes of it.
  static constexpr size_t staging_bytes = size_t{16} << 20;
  char* staging() const { return staging_->data(); }
  /// Of this rank alone: at least so many bytes, valid until the next call.
  char* pinned(size_t size_bytes);

  /// Until the device has done all that it was given, or false.
  bool drain(Deadline deadline, const Interrupted& interrupted);

  /// Held by a collective while it gives the device work. Throws ErrorCode::closed after close().
  std::unique_lock<std::mutex> use();

  /// No collective begins any more. What is left is freed when all ranks have come so far; nobody
  /// waits for that.
  void close();

 private:
  /// How far a rank has come to its end; told to the others in its control memory.
  enum class Stage : uint32_t { working, idle, unmapped };
  static Stage stage_of(const Core& core, int peer);

  void open(Core& core, Deadline deadline);
  void open_everywhere(Core& core, Deadline deadline, const Interrupted& interrupted);
  void close_gpu(Core& core, Deadline deadline);
  bool rest();
  void watch(Core& core);
  void look(Core& core);
  void look_for_departed(Core& core, bool under_way);
  void tear_down(Core& core);
  bool all_reach(Core& core, Stage stage);

  std::unique_ptr<cuda::Gpu> gpu_;
  std::unique_ptr<Direct> direct_;
  std::string why_host_;
  std::shared_ptr<Arena> arena_;
  std::shared_ptr<Block> staging_;
  std::unique_ptr<char[]> own_pinned_;
  size_t own_pinned_bytes_ = 0;

  std::mutex used_;   // see use(); locked before mutex_
  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  bool closing_ = false;

  int64_t alone_since_ns_ = 0;  // the watcher's: since when a kernel waits for who has left
};

}  // namespace ringreduce
