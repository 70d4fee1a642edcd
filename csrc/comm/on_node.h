// One collective of a communicator whose ranks are all on one node: over its window, or over its
// wire if an algorithm that needs one was asked for.
#pragma once

#include "comm/communicator.h"

namespace ringreduce {

/// Runs `call` as the communicator's next collective. An allgather's result goes to `work`.
void run_on_node(Core& core, const Call& call, Work& work, const Interrupted& interrupted);

}  // namespace ringreduce
