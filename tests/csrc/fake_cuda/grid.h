// Runs all threads of a kernel by turns in the calling thread: fibers, which switch where they wait
// for each other or for another kernel. Knows nothing of streams.
#pragma once

#include <functional>

#include "cuda_runtime.h"

namespace fake_cuda {

/// Returns when all threads of the grid have. `body` is what each of them does.
void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body);

}  // namespace fake_cuda
