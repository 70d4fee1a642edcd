// Whose cache a line of memory lies in, where cores share it: hints, and copies that mind it.
#pragma once

#include <cstddef>

namespace ringreduce {

/// What the caches keep and pass on; a wrong value would cost time only.
inline constexpr size_t cache_line_bytes = 64;

/// Fetches a line that this core will write soon and that others have held, so that the write need
/// not wait for them to give it up. Only a hint.
[[gnu::always_inline]] inline void expect_write(const void* line) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(line)));
#else
  __builtin_prefetch(line, 1);
#endif
}

/// What take() leaves at the start of each line. Exact tests, whose numbers are small and whole,
/// see it in any dtype: a zero would be what a float of theirs has there anyway.
inline constexpr unsigned char taken_mark = 0xa5;

/// Takes the lines of [data, data + bytes) away from the core that wrote them, by a store to each:
/// what lies there is lost. For what this core alone has read, just now, and its writer will write
/// again. With a mere read both would keep the line, and the writer's next store would first have
/// to get this copy dropped: on AMD Zen 4 that takes 6 to 10 ns where the cores have a common L3
/// and 25 where not, while the store to a line that has been taken waits for nothing. Whoever gives
/// a slot a second reader must end this: that one finds marks in its data.
[[gnu::always_inline]] inline void take(const void* data, size_t bytes) {
  auto* const first = static_cast<volatile unsigned char*>(const_cast<void*>(data));
  for (size_t at = 0; at < bytes; at += cache_line_bytes) first[at] = taken_mark;
}

/// How much is read before it is taken. Measured beside 4 and 16 KB, which take 10 % longer.
inline constexpr size_t taken_bytes = 1024;

/// As memcpy, and takes what it read.
void copy_and_take(void* to, const void* from, size_t bytes);

/// As memcpy, for what is not read again soon, as gradients on their way are: a line that is
/// written whole need not be fetched first, and throws nothing else out of the caches. What it
/// wrote is ordered before any later store, as with an ordinary copy.
void copy_past_caches(void* to, const void* from, size_t bytes);

}  // namespace ringreduce
