// Memory of devices that ranks lend to each other's kernels.
#pragma once

#include <cstddef>

namespace ringreduce::cuda {

/// Of the current device. Not cleared. Throws ErrorCode::resource.
char* allocate_on_device(size_t size_bytes);

/// Null is nothing. `for_reuse`: is kept for the next allocation of this size instead. Ranks that
/// are threads of one process need that: freeing waits for all kernels of the process, and one of
/// them may wait for the very rank that frees.
void free_on_device(char* data, size_t size_bytes, bool for_reuse);

}  // namespace ringreduce::cuda
