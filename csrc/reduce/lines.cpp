#include "reduce/lines.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace ringreduce {

void copy_and_take(void* to, const void* from, size_t bytes) {
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  for (size_t at = 0; at < bytes; at += taken_bytes) {
    const size_t length = std::min(taken_bytes, bytes - at);
    std::memcpy(target + at, source + at, length);
    take(source + at, length);
  }
}

#ifdef __SSE2__

void copy_past_caches(void* to, const void* from, size_t bytes) {
  constexpr size_t line = cache_line_bytes, ahead = 1024;
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  const size_t head = std::min(bytes, (line - reinterpret_cast<uintptr_t>(to) % line) % line);
  std::memcpy(target, source, head);
  size_t at = head;
  for (; at + line <= bytes; at += line) {
    __builtin_prefetch(source + at + ahead);
    __m128i part[4];
    for (size_t i = 0; i < 4; ++i) {
      part[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at) + i);
    }
    for (size_t i = 0; i < 4; ++i) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + at) + i, part[i]);
    }
  }
  std::memcpy(target + at, source + at, bytes - at);
  _mm_sfence();  // a release store alone would not wait for these
}

#else

void copy_past_caches(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

#endif

}  // namespace ringreduce
