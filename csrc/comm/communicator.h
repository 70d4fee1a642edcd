// A communicator: a group of ranks and everything they need to talk. Owns the node's sockets, the
// control and staging memory, the symmetric arena, and the engine that keeps operations in order.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "comm/accelerator.h"
#include "comm/arena.h"
#include "comm/call.h"
#include "comm/cluster.h"
#include "comm/engine.h"
#include "comm/trace.h"
#include "comm/tuner.h"
#include "shm/group.h"
#include "shm/window.h"
#include "shm/wire.h"

namespace ringreduce {

struct Options {
  bool in_process = false;   // the ranks are threads of this process
  double timeout_s = 1800;   // of any one collective
  double warn_after_s = 30;  // a line on stderr that says who is missing
  Algorithm algorithm = Algorithm::automatic;
  std::string name = "world";  // for messages
  std::string host = {};       // ranks that give different ones are on different hosts
  std::shared_ptr<Trace> trace = std::make_shared<Trace>();  // of all communicators of this rank
  Measured measured{};  // constants of the links, in place of the source's
};

/// What operations run on; shared with the progress thread, which may outlive the Communicator by
/// one operation.
struct Core : std::enable_shared_from_this<Core> {
  Core(int rank, int size, const Exchange& exchange, const Options& options,
       const OpenNetwork& open_network);

  const int rank, size;
  const Options options;
  Node node;
  Group group;
  Window window;
  std::unique_ptr<Cluster> cluster;  // only if the ranks are on several nodes
  std::unique_ptr<ShmWire> wire;     // only if an algorithm that needs it was asked for
  const Tuner tuner;
  const std::shared_ptr<Arena> arena;
  std::atomic<uint64_t> sequence{0};  // of the last collective that began
  std::atomic<bool> closing{false};
  const std::shared_ptr<const std::string> name;  // options.name, shared with trace records

  /// What waits look at during one collective; the header and `interrupted` outlive it.
  GroupWatch watch(const Header& header, const Interrupted& interrupted) {
    return {group, header, {options.warn_after_s, options.timeout_s}, interrupted, closing};
  }
  /// Aborts on all ranks: this one has failed by itself, and is out of step.
  void abort_failed(const std::exception& error) {
    group.abort(ErrorCode::peer_failed, rank,
                "rank " + std::to_string(rank) + " failed: " + error.what());
  }

  /// Null until the first collective on GPU memory. Any thread.
  std::shared_ptr<Accelerator> accelerator() const;
  void set_accelerator(std::shared_ptr<Accelerator> accelerator);

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<Accelerator> accelerator_;
};

class Communicator {
 public:
  /// Collective over the ranks that `exchange` joins. `open_network`: called if they are on several
  /// hosts; not kept.
  Communicator(int rank, int size, const Exchange& exchange, const Options& options,
               const OpenNetwork& open_network = {});
  ~Communicator() { close(); }

  /// Runs the collective, on this thread if nothing else is under way. When it has ended well,
  /// throws the error of an earlier one that nobody waited for.
  void run(const Call& call, Work& work, const Interrupted& interrupted);
  /// Starts it, and returns at once. Its error comes from wait(), or else from the next run().
  std::shared_ptr<Work> start(Call call);

  /// Collective. Symmetric memory of at least `size_bytes`, of a device or, for -1, of the host.
  std::shared_ptr<Block> allocate(size_t size_bytes, int device, const Interrupted& interrupted);

  /// Local. Throws what has ended the communicator, if anything has.
  void check();

  /// Ends the communicator on all ranks: they raise PeerFailed with this reason, which names this
  /// rank.
  void abort(const std::string& reason);
  /// After an abort: this rank has told its user, and may end. Other nodes hear of it now.
  void mark_reported();
  /// Whether all ranks have. Of those on other nodes nothing is known: then never.
  bool all_reported() const;
  /// Local; does not wait. What is under way is aborted.
  void close();
  /// Until all has ended, or false; throws the error of what nobody waited for.
  bool drain(double timeout_s, const Interrupted& interrupted);
  /// Waits for a Work and throws its error; false if `deadline` came first.
  bool wait(Work& work, Deadline deadline, const Interrupted& interrupted);
  /// Waits for the device.
  bool wait(cuda::Event& event, Deadline deadline, const Interrupted& interrupted);

  bool closed() const { return closed_; }
  Core& core() const { return *core_; }

 private:
  void check_process() const;
  void check_usable();
  bool in_forked_child() const;
  template <class Operation>
  void run_in_order(const Operation& operation, const Interrupted& interrupted);

  std::shared_ptr<Core> core_;
  std::shared_ptr<Engine> engine_;
  uint64_t fork_generation_;
  std::atomic<bool> closed_{false};
  std::atomic<bool> told_{false};  // whether an error was thrown to the user
};

}  // namespace ringreduce
