#include "net/mpi_api.h"

#include <dlfcn.h>

#include <cstring>
#include <type_traits>

#include "base/deadline.h"
#include "base/error.h"

namespace ringreduce {
namespace {

constexpr size_t max_status_bytes = 128;  // 20 (MPICH), 24 (Open MPI) or 32 (the ABI of MPI 5)
constexpr size_t max_error_bytes = 8192;  // MPI_MAX_ERROR_STRING is 256 to 1024
constexpr double cancel_limit_s = 0.02;   // for what is local work, if at times on another thread

/// The functions as C declares them, for the two kinds of handles that there are. Counts, tags and
/// error codes are ints everywhere.
template <class Handle>
struct MpiTable {
  int (*isend)(const void*, int, Handle, int, int, Handle, Handle*);
  int (*irecv)(void*, int, Handle, int, int, Handle, Handle*);
  int (*test)(Handle*, int*, void*);
  int (*get_count)(const void*, Handle, int*);
  int (*cancel)(Handle*);
  int (*finalized)(int*);
  int (*error_string)(int, char*, int*);
};

/// A status that MPI writes: never MPI_STATUS_IGNORE, whose value differs from MPI to MPI.
struct alignas(16) Status {
  unsigned char bytes[max_status_bytes] = {};
};

template <class Handle>
Handle handle_of(const std::string& bytes) {
  Handle handle;
  std::memcpy(&handle, bytes.data(), sizeof(handle));
  return handle;
}

template <class Handle>
class LoadedMpi final : public Mpi {
 public:
  LoadedMpi(const MpiLibrary& library, const MpiTable<Handle>& table, bool takes_device_memory)
      : Mpi(library.max_tag, takes_device_memory),
        table_(table),
        communicator_(handle_of<Handle>(library.communicator)),
        byte_type_(handle_of<Handle>(library.byte_type)),
        null_request_(handle_of<Handle>(library.null_request)),
        undefined_(library.undefined) {}

  void isend(const void* data, size_t size_bytes, int to, int tag, Request& request) override {
    Handle handle = null_request_;
    check("MPI_Isend",
          table_.isend(data, count_of(size_bytes), byte_type_, to, tag, communicator_, &handle));
    set(request, handle);
  }

  void irecv(void* data, size_t capacity_bytes, int from, int tag, Request& request) override {
    Handle handle = null_request_;
    check("MPI_Irecv", table_.irecv(data, count_of(capacity_bytes), byte_type_, from, tag,
                                    communicator_, &handle));
    set(request, handle);
  }

  bool test(Request& request, size_t* received_bytes) override {
    if (!request) return true;
    Handle handle = get(request);
    Status status;
    int ended = 0;
    const int code = table_.test(&handle, &ended, status.bytes);
    if (code != 0) request = {};
    check("MPI_Test", code);
    if (!ended) return false;
    request = {};
    if (received_bytes != nullptr) *received_bytes = size_of(status);
    return true;
  }

  bool cancel(Request& request) noexcept override {
    if (!request) return true;
    Handle handle = get(request);
    request = {};
    int finalized = 0;
    if (table_.finalized(&finalized) != 0 || finalized) return true;  // MPI is gone
    if (table_.cancel(&handle) != 0) return false;
    // The cancelled receive ends without its sender. What does not end here was matched before, and
    // its sender may be dead.
    const Deadline limit = Deadline::after_s(cancel_limit_s);
    Status status;
    int ended = 0;
    do {
      if (table_.test(&handle, &ended, status.bytes) != 0) return true;
    } while (!ended && !limit.passed(now_ns()));
    return ended != 0;
  }

 private:
  static int count_of(size_t size_bytes) {
    if (size_bytes > max_message_bytes) {
      throw Error(ErrorCode::invalid,
                  "a message of " + std::to_string(size_bytes) + " bytes is too long for MPI");
    }
    return static_cast<int>(size_bytes);
  }

  static Handle get(const Request& request) {
    Handle handle;
    std::memcpy(&handle, &request.handle, sizeof(handle));
    return handle;
  }

  void set(Request& request, Handle handle) const {
    request = {};
    // An operation that has ended at once may give the null request.
    if (handle != null_request_) std::memcpy(&request.handle, &handle, sizeof(handle));
  }

  size_t size_of(const Status& status) const {
    int count = 0;
    check("MPI_Get_count", table_.get_count(status.bytes, byte_type_, &count));
    return count == undefined_ ? 0 : static_cast<size_t>(count);
  }

  void check(const char* function, int code) const {
    if (code == 0) return;
    char text[max_error_bytes] = {};
    int length = 0;
    if (table_.error_string(code, text, &length) != 0) text[0] = '\0';
    throw Error(ErrorCode::resource,
                std::string(function) + " failed with error " + std::to_string(code) + ": " + text);
  }

  const MpiTable<Handle> table_;
  const Handle communicator_, byte_type_, null_request_;
  const int undefined_;
};

/// An extension that Open MPI, MPICH and what comes of it have; an MPI without it does not say.
bool is_cuda_aware(const MpiLibrary& library, const std::function<void*(const char*)>& symbol) {
  void* const query = library.ask_for_cuda ? symbol("MPIX_Query_cuda_support") : nullptr;
  return query != nullptr && reinterpret_cast<int (*)()>(query)() == 1;
}

template <class Handle>
std::shared_ptr<Mpi> make(const MpiLibrary& library,
                          const std::function<void*(const char*)>& symbol) {
  MpiTable<Handle> table;
  const auto find = [&](const char* name, auto& function) {
    void* const address = symbol(name);
    if (address == nullptr) {
      throw Error(ErrorCode::resource, std::string(name) + " is not in the MPI of " + library.path);
    }
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
  };
  find("MPI_Isend", table.isend);
  find("MPI_Irecv", table.irecv);
  find("MPI_Test", table.test);
  find("MPI_Get_count", table.get_count);
  find("MPI_Cancel", table.cancel);
  find("MPI_Finalized", table.finalized);
  find("MPI_Error_string", table.error_string);
  return std::make_shared<LoadedMpi<Handle>>(library, table, is_cuda_aware(library, symbol));
}

}  // namespace

std::shared_ptr<Mpi> make_mpi(const MpiLibrary& library,
                              const std::function<void*(const char*)>& symbol) {
  if (library.status_bytes > max_status_bytes) {
    throw Error(ErrorCode::resource, "an MPI_Status of " + std::to_string(library.status_bytes) +
                                         " bytes: this MPI is not known (" + library.path + ")");
  }
  for (const std::string* handle :
       {&library.communicator, &library.byte_type, &library.null_request}) {
    if (handle->size() != library.handle_bytes) {
      throw Error(ErrorCode::invalid, "a handle of MPI has another size than its communicator");
    }
  }
  if (library.handle_bytes == sizeof(int)) return make<int>(library, symbol);
  if (library.handle_bytes == sizeof(void*)) return make<void*>(library, symbol);
  throw Error(ErrorCode::resource, "handles of " + std::to_string(library.handle_bytes) +
                                       " bytes: this MPI is not known (" + library.path + ")");
}

std::shared_ptr<Mpi> load_mpi(const MpiLibrary& library) {
  // A handle of the extension finds the symbols of the very libmpi that it was linked to, which may
  // be in no global scope. It stays open: MPI must not be unloaded before the process ends.
  void* const loaded = dlopen(library.path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (loaded == nullptr) {
    throw Error(ErrorCode::resource, "mpi4py's extension is not loaded: " + library.path);
  }
  return make_mpi(library, [loaded](const char* name) { return dlsym(loaded, name); });
}

}  // namespace ringreduce
