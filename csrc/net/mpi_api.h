// The few calls of MPI that ranks of different nodes need, made through the library that mpi4py has
// loaded: by pointers found at run time, so nothing is linked against a particular MPI and no MPI
// header is read. Does not start or end MPI, and knows neither groups nor collectives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace ringreduce {

/// What Python reads from mpi4py: where the library is, how large its types are, and the bytes of
/// the handles that we use. The communicator's error handler must be MPI_ERRORS_RETURN; it belongs
/// to Python, which keeps it until all operations have ended.
struct MpiLibrary {
  std::string path;                                   // of the extension module that MPI came with
  size_t handle_bytes = 0;                            // 4: an int (MPICH, Intel MPI); 8: a pointer
  size_t status_bytes = 0;                            // of an MPI_Status
  std::string communicator, byte_type, null_request;  // handles, as they lie in memory
  int undefined = 0;                                  // MPI_UNDEFINED
  int max_tag = 32767;                                // MPI_TAG_UB; so much every MPI allows
  bool ask_for_cuda = true;  // whether to believe an MPI that says it takes a GPU's memory
};

/// Point-to-point messages over one communicator. Every call is thread-safe (MPI_THREAD_MULTIPLE is
/// required) and returns at once; messages move while somebody is in one of these calls. Memory
/// given to isend or irecv is MPI's until test() has been true. A call that MPI refuses throws
/// Error(resource) with MPI's own words; cancel(), which ends things, never does.
class Mpi {
 public:
  static constexpr size_t max_message_bytes = size_t{1} << 30;  // MPI counts with an int

  /// An operation under way, or none. A plain value: copies stand for the same operation.
  struct Request {
    uint64_t handle = 0;  // MPI's, widened; 0 is no handle of any MPI
    explicit operator bool() const { return handle != 0; }
  };

  explicit Mpi(int max_tag, bool takes_device_memory = false)
      : max_tag(max_tag), takes_device_memory(takes_device_memory) {}
  virtual ~Mpi() = default;

  const int max_tag;               // of a message; equal on all ranks
  const bool takes_device_memory;  // messages may lie on a GPU: the MPI is CUDA-aware

  virtual void isend(const void* data, size_t size_bytes, int to, int tag, Request& request) = 0;
  /// A longer message than `capacity_bytes` is an error, thrown by test().
  virtual void irecv(void* data, size_t capacity_bytes, int from, int tag, Request& request) = 0;
  /// Whether the operation has ended; the request is none from then on, also after an error. True
  /// of none. `received_bytes`: of the message, once a receive has ended.
  virtual bool test(Request& request, size_t* received_bytes = nullptr) = 0;
  /// Gives up a receive, and waits for no peer. True if MPI will not write to its memory any more;
  /// false if a message was on its way already: that memory must then live until MPI has ended.
  virtual bool cancel(Request& request) noexcept = 0;
};

/// Throws Error(resource) that says which library or symbol is missing.
std::shared_ptr<Mpi> load_mpi(const MpiLibrary& library);

/// The same, over functions from elsewhere: `symbol` gives the address of a name, or null.
std::shared_ptr<Mpi> make_mpi(const MpiLibrary& library,
                              const std::function<void*(const char*)>& symbol);

}  // namespace ringreduce
