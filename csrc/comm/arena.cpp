#include "comm/arena.h"

#include <algorithm>
#include <cstring>

namespace ringreduce {
namespace {

constexpr size_t alignment_bytes = 128;  // no two blocks share a cache line, nor its neighbour
constexpr size_t page_bytes = 4096;
constexpr size_t smallest_pool_bytes = size_t{1} << 20;  // small tensors share a segment

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

Block::~Block() { arena_->mark_free(id_); }

void Arena::mark_free(uint64_t id) {
  std::lock_guard lock(mutex_);
  marks_.push_back(id);
}

std::shared_ptr<Block> Arena::allocate(Node& node, size_t size_bytes, Deadline deadline) {
  const auto create = [&](size_t pool_bytes) { return node.create_segment(pool_bytes, deadline); };
  return allocate(node, size_bytes, deadline, {create, [](const Segment&) {}});
}

std::shared_ptr<Block> Arena::allocate(Node& node, size_t size_bytes, Deadline deadline,
                                       const Segments& segments) {
  exchange_marks(node, deadline);
  local_rank_ = node.local_rank();
  const size_t padded = round_up(std::max<size_t>(size_bytes, 1), alignment_bytes);
  Live block{};
  std::vector<Segment> empty;
  {
    std::lock_guard lock(mutex_);
    if (!place(padded, &block)) empty = take_empty_pools();
  }
  for (const Segment& segment : empty) segments.drop(segment);
  empty.clear();
  if (block.size_bytes == 0) {
    const size_t pool_bytes = round_up(std::max(padded, smallest_pool_bytes), page_bytes);
    Segment segment = segments.create(pool_bytes);
    std::lock_guard lock(mutex_);
    pools_[next_pool_++] = Pool{std::move(segment), {{0, pool_bytes}}};
    place(padded, &block);
  }
  std::lock_guard lock(mutex_);
  const uint64_t id = next_block_++;
  live_[id] = block;
  char* data = pools_.at(block.pool).segment.block(local_rank_) + block.offset;
  return std::make_shared<Block>(shared_from_this(), id, data);
}

/// Learns what others have freed; a block that all ranks freed is free.
void Arena::exchange_marks(Node& node, Deadline deadline) {
  std::string mine;
  {
    std::lock_guard lock(mutex_);
    mine.assign(reinterpret_cast<const char*>(marks_.data()), marks_.size() * sizeof(uint64_t));
    marks_.clear();
  }
  for (const std::string& marks : node.exchange(mine, deadline)) {
    std::lock_guard lock(mutex_);
    for (size_t at = 0; at + sizeof(uint64_t) <= marks.size(); at += sizeof(uint64_t)) {
      uint64_t id = 0;
      std::memcpy(&id, marks.data() + at, sizeof(id));
      const auto block = live_.find(id);
      if (block == live_.end() || ++block->second.freed_by < node.local_size()) continue;
      give_back(block->second);
      live_.erase(block);
    }
  }
}

void Arena::give_back(const Live& block) {
  Pool& pool = pools_.at(block.pool);
  --pool.num_blocks;
  auto freed = pool.free.emplace(block.offset, block.size_bytes).first;
  const auto next = std::next(freed);
  if (next != pool.free.end() && freed->first + freed->second == next->first) {
    freed->second += next->second;
    pool.free.erase(next);
  }
  if (freed != pool.free.begin()) {
    const auto before = std::prev(freed);
    if (before->first + before->second == freed->first) {
      before->second += freed->second;
      pool.free.erase(freed);
    }
  }
}

/// The smallest gap that is large enough; the first of equals.
bool Arena::place(size_t size_bytes, Live* block) {
  Pool* best_pool = nullptr;
  uint64_t best_id = 0;
  std::map<size_t, size_t>::iterator best;
  for (auto& [id, pool] : pools_) {
    for (auto gap = pool.free.begin(); gap != pool.free.end(); ++gap) {
      if (gap->second < size_bytes || (best_pool && gap->second >= best->second)) continue;
      best_pool = &pool;
      best_id = id;
      best = gap;
    }
  }
  if (!best_pool) return false;
  *block = {best_id, best->first, size_bytes, 0};
  const size_t left = best->second - size_bytes;
  best_pool->free.erase(best);
  if (left > 0) best_pool->free.emplace(block->offset + size_bytes, left);
  ++best_pool->num_blocks;
  return true;
}

std::vector<Segment> Arena::take_empty_pools() {
  std::vector<Segment> empty;
  std::erase_if(pools_, [&](auto& entry) {
    if (entry.second.num_blocks > 0) return false;
    empty.push_back(std::move(entry.second.segment));
    return true;
  });
  return empty;
}

Arena::Place Arena::locate(const void* data, size_t size_bytes) const {
  std::lock_guard lock(mutex_);
  const auto address = reinterpret_cast<uintptr_t>(data);
  for (const auto& [id, pool] : pools_) {
    const auto begin = reinterpret_cast<uintptr_t>(pool.segment.block(local_rank_));
    if (begin <= address && address + size_bytes <= begin + pool.segment.size_bytes) {
      return {id, address - begin};
    }
  }
  return {};
}

char* Arena::at(int local_rank, Place place, size_t size_bytes) const {
  std::lock_guard lock(mutex_);
  const auto pool = pools_.find(place.segment);
  if (pool == pools_.end()) return nullptr;
  const size_t limit = pool->second.segment.size_bytes;
  if (place.offset_bytes > limit || size_bytes > limit - place.offset_bytes) return nullptr;
  return pool->second.segment.block(local_rank) + place.offset_bytes;
}

size_t Arena::num_segments() const {
  std::lock_guard lock(mutex_);
  return pools_.size();
}

size_t Arena::segment_bytes() const {
  std::lock_guard lock(mutex_);
  size_t total = 0;
  for (const auto& [id, pool] : pools_) total += pool.segment.size_bytes;
  return total;
}

}  // namespace ringreduce
