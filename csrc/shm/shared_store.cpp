#include "shm/shared_store.h"

#include <algorithm>
#include <cstring>

#include "base/deadline.h"

#ifdef __x86_64__
#include <emmintrin.h>
#endif

namespace ringreduce {
namespace {

constexpr size_t smallest_streamed_bytes = 1024;  // below, a few lines do not pay for the fence
constexpr size_t smallest_timed_bytes = 4096;     // 0.1 us at best; the clock takes 0.03 us
// Readers find what was streamed in no cache, so the writer's gain must be large: where caches are
// apart it is elevenfold, where they are shared at most twofold and a loss on the whole.
constexpr double worth_streaming = 3;

// A trial is a few times around the staging ring, of which the first half is not counted. The other
// way may be ten times slower: so a trial is rare enough to cost 5 % at worst.
constexpr size_t trial_bytes = size_t{4} << 20;
constexpr size_t trust_bytes = size_t{800} << 20;

}  // namespace

void stream_copy(char* to, const char* from, size_t size_bytes) {
#ifdef __x86_64__
  const size_t head = std::min(-reinterpret_cast<uintptr_t>(to) % 64, size_bytes);
  std::memcpy(to, from, head);
  size_t done = head;
  for (; done + 64 <= size_bytes; done += 64) {
    __m128i line[4];
    std::memcpy(line, from + done, sizeof(line));
    auto* target = reinterpret_cast<__m128i*>(to + done);
    for (int part = 0; part < 4; ++part) _mm_stream_si128(target + part, line[part]);
  }
  std::memcpy(to + done, from + done, size_bytes - done);
  // Streaming stores are not ordered by a later release store: without this a reader could see the
  // flag and old data.
  _mm_sfence();
#else
  std::memcpy(to, from, size_bytes);
#endif
}

void SharedStore::copy(char* to, const char* from, size_t size_bytes) {
  const bool timed = size_bytes >= smallest_timed_bytes;
  const bool stream = streams_ && size_bytes >= smallest_streamed_bytes;
  const int64_t begin_ns = timed ? now_ns() : 0;
  if (stream) {
    stream_copy(to, from, size_bytes);
  } else {
    std::memcpy(to, from, size_bytes);
  }
  if (!timed) return;
  phase_bytes_ += size_bytes;
  if (!trying_ || phase_bytes_ > trial_bytes / 2) {
    const double cost = static_cast<double>(now_ns() - begin_ns) / static_cast<double>(size_bytes);
    double& smoothed = ns_per_byte_[stream];
    // A copy that was interrupted counts as twice as slow at most.
    smoothed = smoothed == 0 ? cost : smoothed + (std::min(cost, 2 * smoothed) - smoothed) / 4;
  }
  if (phase_bytes_ >= (trying_ ? trial_bytes : trust_bytes)) next_phase();
}

/// Begins with a trial of plain stores, then one of streaming ones.
void SharedStore::next_phase() {
  phase_bytes_ = 0;
  const auto [plain, stream] = ns_per_byte_;
  if (stream == 0) {
    streams_ = true;
    return;
  }
  if (trying_) preferred_ = plain > worth_streaming * stream;
  trying_ = !trying_;
  streams_ = trying_ ? !preferred_ : preferred_;
}

}  // namespace ringreduce
