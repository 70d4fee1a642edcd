// Copies into shared memory that other cores have read before and will read again. Whether a plain
// store or one that bypasses the caches is cheaper depends on where the ranks run, which a
// hypervisor or the kernel may change at any time: so it is measured as it goes. Each rank decides
// for itself; what arrives is the same.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ringreduce {

/// Before a line can be stored to, all other caches must give it up. Measured on AMD Zen 4, two
/// cores: with a common L3 a plain copy goes at 42 GB/s and a streaming one at 14; without, at 2.4
/// and at 27, and what was streamed is read as fast as what was not. One thread at a time.
class SharedStore {
 public:
  void copy(char* to, const char* from, size_t size_bytes);
  /// How large pieces are copied now.
  bool streams() const { return streams_; }

 private:
  void next_phase();

  // One way is used for long, then the other is tried for a while: what a store costs depends on
  // how the same memory was written and read before.
  bool trying_ = true, streams_ = false, preferred_ = false;
  size_t phase_bytes_ = 0;      // copied in this phase
  double ns_per_byte_[2] = {};  // plain, streaming: smoothed; 0: not measured yet
};

/// Past the caches; visible to others before any later store is (so a flag may be published next).
void stream_copy(char* to, const char* from, size_t size_bytes);

}  // namespace ringreduce
