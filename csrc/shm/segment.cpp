#include "shm/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>

#include "base/error.h"

namespace ringreduce {
namespace {

class Pages : public Memory {
 public:
  Pages(void* data, size_t size_bytes) : size_bytes_(size_bytes) {
    data_ = static_cast<char*>(data);
  }
  ~Pages() override { munmap(data_, size_bytes_); }

 private:
  size_t size_bytes_;
};

[[noreturn]] void fail(const std::string& what, size_t size_bytes) {
  const std::string reason = std::strerror(errno);
  throw Error(ErrorCode::resource,
              what + " of " + std::to_string(size_bytes) + " bytes of shared memory failed: " +
                  reason + ". Free memory, or raise the memory limit of the container or job");
}

std::shared_ptr<Memory> map(int fd, size_t size_bytes, int flags) {
  void* data = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (data == MAP_FAILED) fail("mapping", size_bytes);
  return std::make_shared<Pages>(data, size_bytes);
}

/// Returns an errno. Kernels before 6.10 give up, and take back what they have allocated, when any
/// signal comes, a profiler's or one of a child that has ended: so in pieces that take less than
/// the time between two of them.
int allocate(int fd, size_t size_bytes) {
  constexpr size_t piece_bytes = size_t{1} << 20;
  if (ftruncate(fd, static_cast<off_t>(size_bytes)) != 0) return errno;  // more than files can have
  int error = 0;
  for (size_t begin = 0; begin < size_bytes && error == 0; begin += piece_bytes) {
    const size_t length = std::min(piece_bytes, size_bytes - begin);
    do {
      error = posix_fallocate(fd, static_cast<off_t>(begin), static_cast<off_t>(length));
    } while (error == EINTR);
  }
  return error;
}

/// What this machine can give, swap included; any number of bytes where that cannot be read.
size_t available_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string name, rest;
  size_t kilobytes = 0, total_bytes = 0;
  while (file >> name >> kilobytes && std::getline(file, rest)) {
    if (name == "MemAvailable:" || name == "SwapFree:") total_bytes += kilobytes << 10;
  }
  return total_bytes > 0 ? total_bytes : SIZE_MAX;
}

}  // namespace

void check_available(size_t size_bytes) {
  if (size_bytes <= available_bytes()) return;
  errno = ENOMEM;
  fail("allocation", size_bytes);
}

int create_memfd(size_t size_bytes) {
  const int fd = memfd_create("ringreduce", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0 && (errno == EPERM || errno == ENOSYS)) {
    throw Error(ErrorCode::resource,
                std::string("memfd_create, by which ranks share memory, failed: ") +
                    std::strerror(errno) + ". Let the container's seccomp profile allow it");
  }
  if (fd < 0) fail("creation", size_bytes);
  const int error = allocate(fd, size_bytes);
  if (error != 0 || fchmod(fd, 0600) != 0 ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    if (error != 0) errno = error;
    const int saved = errno;
    close(fd);
    errno = saved;
    fail("allocation", size_bytes);
  }
  return fd;
}

std::shared_ptr<Memory> map_memfd(int fd, size_t size_bytes) {
  struct stat status{};
  const int seals = fcntl(fd, F_GET_SEALS);
  if (fstat(fd, &status) != 0 || static_cast<size_t>(status.st_size) != size_bytes || seals < 0 ||
      (seals & F_SEAL_SHRINK) == 0) {
    throw Error(ErrorCode::resource, "a peer sent shared memory that is not what was agreed on");
  }
  return map(fd, size_bytes, MAP_SHARED);
}

std::shared_ptr<Memory> allocate_pages(size_t size_bytes) {
  return map(-1, size_bytes, MAP_PRIVATE | MAP_ANONYMOUS);
}

}  // namespace ringreduce
