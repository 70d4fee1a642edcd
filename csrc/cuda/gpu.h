// A communicator's GPU: the memory that ranks' kernels share, streams and events, and the launch of
// one collective. Needs no CUDA header; where the build has no CUDA, no_cuda.cpp stands in and
// says so. Knows nothing of sockets or of other nodes: what the ranks must tell each other goes
// through the Exchange that it is given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/exchange.h"
#include "cuda/kernels.h"

namespace ringreduce::cuda {

/// What this build and this machine have, for people.
struct About {
  std::string built;    // "13.0 for sm_90"; empty: without CUDA
  std::string runtime;  // "runtime 13.0, driver 13.1"
  int devices = 0;
  std::string unavailable;  // why no device can be used; empty: one can
};
About about();

/// Makes a device the calling thread's for good, which is one of this library's own: no call of it
/// then touches another device, where each process would take half a GB, or ruins a graph that
/// others record.
void settle(int device);

/// The same until the result is dropped, for a thread of the user's that other libraries find their
/// way by.
std::shared_ptr<void> borrow(int device);

/// Whether a stream is recording a CUDA graph.
bool capturing(void* stream);

/// A moment on a stream: of all that the stream had been given before. Any thread.
class Event {
 public:
  virtual ~Event() = default;
  /// Whether the device has come to it.
  virtual bool done() = 0;
  /// Lets a stream wait for it. Does not block.
  virtual void hold_back(void* stream) = 0;
};

/// The moment after all that a stream of this device has been given.
std::shared_ptr<Event> record(int device, void* stream);

/// Device memory of every rank; null where this process does not see a rank's. Each rank owns its
/// own.
struct Shared {
  size_t size_bytes = 0;
  std::vector<char*> blocks;  // by rank
};

class Gpu {
 public:
  struct Options {
    int rank = 0, size = 1;  // within the node
    int device = 0;
    bool in_process = false;   // the ranks are threads of this process
    bool other_nodes = false;  // there are ranks elsewhere
    bool wire = false;         // ring or tree was asked for
    double timeout_s = 0;      // of any one collective
  };
  /// Collective over the node. Throws ErrorCode::resource on all ranks if one of them has no
  /// such device, or no memory.
  static std::unique_ptr<Gpu> open(const Options& options, const Exchange& exchange);
  virtual ~Gpu() = default;

  /// Why collectives go through host memory; empty: kernels of all ranks reach each other's memory.
  virtual const std::string& why_host() const = 0;
  virtual size_t slab_bytes() const = 0;
  /// Blocks that a kernel may have.
  virtual int blocks() const = 0;

  /// A stream of this communicator's own, for asynchronous calls.
  virtual void* side_stream() = 0;

  // What a communicator enqueues runs in the order of issue, also where streams differ: between
  // begin() and end() of the same stream.
  virtual void begin(void* stream) = 0;
  virtual void end(void* stream) = 0;

  /// Fills in what a DeviceCall says of the ranks, and enqueues it. Kernels reach each other.
  virtual void launch(Kernel kernel, DeviceCall& call, void* stream) = 0;
  /// Between device memory and pinned host memory, either way, or within the device.
  virtual void copy(void* to, const void* from, size_t size_bytes, void* stream) = 0;
  /// Lets copies to and from this host memory be asynchronous, where the driver permits; until
  /// unpin().
  virtual void pin(char* data, size_t size_bytes) = 0;
  virtual void unpin(char* data) = 0;

  /// Collective. Where kernels do not reach each other, a rank sees its own block only. Throws
  /// ErrorCode::resource on all ranks if one of them has no memory.
  virtual Shared share(size_t size_bytes, const Exchange& exchange) = 0;
  /// Collective: all ranks let go of the peers' blocks, then free their own. No kernel uses them.
  virtual void release(const Shared& shared, const Exchange& exchange) = 0;

  /// Of this rank alone, until it is freed, which may wait for the device. Throws
  /// ErrorCode::resource.
  virtual char* allocate(size_t size_bytes) = 0;
  virtual void free(char* data, size_t size_bytes) = 0;

  /// What kernels have said.
  struct Report {
    Trouble trouble = Trouble::none;
    int peer = 0;
    bool under_way = false;  // a kernel has begun and not ended
  };
  virtual Report report() const = 0;
  /// Kernels leave their waits, now and later.
  virtual void abort() = 0;

  // The end, in this order, each when all ranks have done the one before: destructors free
  // nothing that a peer may still use.
  virtual bool idle() = 0;         // all that was enqueued has ended, and no graph's kernel runs
  virtual void close_peers() = 0;  // unmaps the peers' slabs
  virtual void free_own() = 0;     // the slab and the streams
};

}  // namespace ringreduce::cuda
