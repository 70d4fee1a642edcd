// Where the slots of a rank's staging memory lie. They follow each other around a ring, each as
// large as its message needs: a small message does not leave gaps, so the ring's lines are written
// again as late as can be, when peers no longer hold them. Every rank makes the same calls, so all
// agree on the places without a word.
#pragma once

#include <cstddef>

namespace ringreduce {

class StagingRing {
 public:
  /// Slots are never larger than a `slots`-th of the ring. A slot of any size then shares no byte
  /// with the `slots` - 2 slots before it: with these they fill at most `slots` - 1 parts, and the
  /// gap at the end of the ring, where the next one did not fit, is smaller than one part.
  StagingRing(size_t largest_slot_bytes, size_t slots) : size_bytes_(largest_slot_bytes * slots) {}

  /// Bytes from the ring's start to the index-th of the slots to come, all of `slot_bytes`.
  size_t offset(size_t slot_bytes, size_t index) const {
    const size_t before_end = (size_bytes_ - cursor_) / slot_bytes;
    if (index < before_end) return cursor_ + index * slot_bytes;
    return (index - before_end) % (size_bytes_ / slot_bytes) * slot_bytes;
  }

  /// So many slots have been used.
  void advance(size_t slot_bytes, size_t count) {
    if (count > 0) cursor_ = offset(slot_bytes, count - 1) + slot_bytes;
  }

  size_t size_bytes() const { return size_bytes_; }

 private:
  size_t size_bytes_, cursor_ = 0;
};

}  // namespace ringreduce
