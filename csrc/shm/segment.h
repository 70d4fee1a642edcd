// A segment: a block of memory of every rank of a node, mapped by all of them. Nameless (memfd), so
// nothing stays behind whoever dies; sealed, so nobody can shrink it under a reader.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace ringreduce {

/// One rank's block as this process sees it. Unmapped when the last owner of the Memory is gone.
class Memory {
 public:
  Memory() = default;
  virtual ~Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return data_; }

 protected:
  char* data_ = nullptr;
};

/// Throws ErrorCode::resource if the machine cannot give so many bytes. Linux does not refuse
/// shared memory: it reserves page after page, and when none is left kills some process.
void check_available(size_t size_bytes);

/// A new memfd of `size_bytes`: allocated now (no memory later means an error here, not a SIGBUS
/// there) and sealed against resizing. The caller closes it. Throws ErrorCode::resource.
int create_memfd(size_t size_bytes);

/// Maps a peer's (or one's own) memfd whole, after checking that it has the size it should have and
/// is sealed.
std::shared_ptr<Memory> map_memfd(int fd, size_t size_bytes);

/// Private memory, for ranks that are threads of one process and for a world of one.
std::shared_ptr<Memory> allocate_pages(size_t size_bytes);

struct Segment {
  size_t size_bytes = 0;                        // of each rank's block
  std::vector<std::shared_ptr<Memory>> blocks;  // by local rank

  char* block(int local_rank) const { return blocks[static_cast<size_t>(local_rank)]->data(); }
};

}  // namespace ringreduce
