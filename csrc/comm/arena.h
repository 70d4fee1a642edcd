// Symmetric memory: blocks that lie in segments mapped by all ranks of the node, so that two_shot
// reduces them without a copy. Allocation is collective; freeing is not, since ranks collect
// garbage at different times: a freed block is only marked, the marks are exchanged at the next
// allocation, and what all ranks have freed is used again. Every rank runs the same allocator on
// the same inputs, so all come to the same places.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "shm/node.h"

namespace ringreduce {

class Arena;

/// A rank's end of a symmetric block. Holds the memory, also after the communicator is closed.
class Block {
 public:
  Block(std::shared_ptr<Arena> arena, uint64_t id, char* data)
      : arena_(std::move(arena)), id_(id), data_(data) {}
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  char* data() const { return data_; }

 private:
  std::shared_ptr<Arena> arena_;
  uint64_t id_;
  char* data_;
};

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  /// Where segments come from and what happens to those that hold nothing any more; both collective
  /// over the node.
  struct Segments {
    std::function<Segment(size_t size_bytes)> create;
    std::function<void(const Segment& segment)> drop;
  };
  /// Collective over the node, in the same order on all ranks.
  std::shared_ptr<Block> allocate(Node& node, size_t size_bytes, Deadline deadline,
                                  const Segments& segments);
  /// The same, in shared memory of the host.
  std::shared_ptr<Block> allocate(Node& node, size_t size_bytes, Deadline deadline);

  /// Where memory of this rank lies: the number of its segment, counted from 1, and the offset from
  /// its start.
  struct Place {
    uint64_t segment = 0;  // 0: private memory
    uint64_t offset_bytes = 0;
  };
  Place locate(const void* data, size_t size_bytes) const;

  /// A rank's memory at a place that it published; null if that lies outside of the segment.
  char* at(int local_rank, Place place, size_t size_bytes) const;

  size_t num_segments() const;
  size_t segment_bytes() const;

 private:
  friend class Block;
  struct Pool {
    Segment segment;
    std::map<size_t, size_t> free;  // bytes by offset, never adjacent
    size_t num_blocks = 0;
  };
  struct Live {
    uint64_t pool;
    size_t offset, size_bytes;
    int freed_by = 0;  // ranks
  };
  void mark_free(uint64_t id);
  void exchange_marks(Node& node, Deadline deadline);
  void give_back(const Live& block);
  bool place(size_t size_bytes, Live* block);
  std::vector<Segment> take_empty_pools();

  mutable std::mutex mutex_;  // of all below: marks come from any thread
  int local_rank_ = 0;
  std::map<uint64_t, Pool> pools_;
  std::map<uint64_t, Live> live_;
  std::vector<uint64_t> marks_;  // freed here since the last exchange
  uint64_t next_pool_ = 1, next_block_ = 1;
};

}  // namespace ringreduce
