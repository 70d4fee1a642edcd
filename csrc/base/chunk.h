// A chunk is a half-open range of elements of a message; blocks are a message cut into one range
// per rank. This is all that an algorithm knows of the data: no pointers, no types, no bytes.
#pragma once

#include <cstddef>

#include "base/device.h"

namespace ringreduce {

/// Elements [offset, offset + length) of a message.
struct Chunk {
  size_t offset = 0;
  size_t length = 0;

  RR_HOST_DEVICE constexpr size_t end() const { return offset + length; }
  RR_HOST_DEVICE constexpr bool empty() const { return length == 0; }

  /// The `index`-th piece of this range when it is cut into pieces of `piece` elements; empty past
  /// the end.
  RR_HOST_DEVICE constexpr Chunk piece(size_t index, size_t piece) const {
    const size_t begin = index * piece < length ? index * piece : length;
    const size_t left = length - begin;
    return {offset + begin, left < piece ? left : piece};
  }
};

/// How a message of `count` elements is divided: block r belongs to rank r. Four forms, all of
/// them pure functions of values that every rank knows:
///   even   equal blocks, rounded up to `granule` elements so that no two ranks share a cache line
///   first  the same among the first `owners` ranks; the others have none
///   table  given offsets (size + 1 of them, not owned), as allgather and reduce_scatter need
///   single all of it belongs to one rank: a broadcast is then an allgather, and a reduce a
///          reduce_scatter
class Blocks {
 public:
  RR_HOST_DEVICE static constexpr Blocks even(size_t count, int size, size_t granule = 1) {
    return first(size, count, size, granule);
  }
  RR_HOST_DEVICE static constexpr Blocks first(int owners, size_t count, int size,
                                               size_t granule = 1) {
    const size_t ranks = static_cast<size_t>(owners);
    const size_t share = (count + ranks - 1) / ranks;
    return Blocks(count, size, (share + granule - 1) / granule * granule, nullptr, -1);
  }
  RR_HOST_DEVICE static constexpr Blocks table(const size_t* offsets, int size) {
    return Blocks(offsets[size], size, 0, offsets, -1);
  }
  RR_HOST_DEVICE static constexpr Blocks single(size_t count, int size, int owner) {
    return Blocks(count, size, 0, nullptr, owner);
  }

  RR_HOST_DEVICE constexpr Chunk operator[](int rank) const {
    if (offsets_) return {offsets_[rank], offsets_[rank + 1] - offsets_[rank]};
    if (owner_ >= 0) return {0, rank == owner_ ? count_ : 0};
    return Chunk{0, count_}.piece(static_cast<size_t>(rank), share_);
  }

  RR_HOST_DEVICE constexpr size_t largest() const {
    if (owner_ >= 0) return count_;
    if (!offsets_) return share_ < count_ ? share_ : count_;
    size_t most = 0;
    for (int rank = 0; rank < size_; ++rank) {
      if ((*this)[rank].length > most) most = (*this)[rank].length;
    }
    return most;
  }

  /// Into how many pieces of `chunk` elements the largest block falls.
  RR_HOST_DEVICE constexpr size_t rounds(size_t chunk) const {
    return (largest() + chunk - 1) / chunk;
  }

  RR_HOST_DEVICE constexpr size_t count() const { return count_; }
  RR_HOST_DEVICE constexpr int size() const { return size_; }

 private:
  RR_HOST_DEVICE constexpr Blocks(size_t count, int size, size_t share, const size_t* offsets,
                                  int owner)
      : count_(count), size_(size), share_(share), offsets_(offsets), owner_(owner) {}

  size_t count_;
  int size_;
  size_t share_;
  const size_t* offsets_;
  int owner_;
};

}  // namespace ringreduce
