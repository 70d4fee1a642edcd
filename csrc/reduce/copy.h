// Copies for memory that is not read again soon, as gradients on their way are. Past the caches: a
// line that is written whole need not be fetched first, and throws nothing else out.
#pragma once

#include <cstddef>

namespace ringreduce {

/// As memcpy. What it wrote is ordered before any later store, as with an ordinary copy.
void copy_past_caches(void* to, const void* from, size_t bytes);

}  // namespace ringreduce
