// One collective on GPU memory: the ranks meet on the host, as for any collective; then kernels are
// launched, or the data go across nodes from GPU to GPU, or through host memory.
#pragma once

#include "comm/communicator.h"

namespace ringreduce {

/// Throws if the communicator works on another device, before anything is sent.
void check_device(const Core& core, int device);

/// Throws what is wrong on this rank alone, before anything is sent.
void check_on_gpu(const Core& core, const Call& call);

/// Runs `call` as the communicator's next collective. Returns when all is enqueued on the call's
/// stream; an asynchronous call's end is work.event.
void run_on_gpu(Core& core, const Call& call, Work& work, const Interrupted& interrupted);

/// The communicator's accelerator. The first call, at the same point of all ranks, opens it.
Accelerator& accelerator_of(Core& core, int device, Deadline deadline,
                            const Interrupted& interrupted);

}  // namespace ringreduce
