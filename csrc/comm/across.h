// One collective of a communicator whose ranks are on several nodes: the nodes' leaders agree
// first, then data move inside the nodes through the window and between them over wires.
#pragma once

#include "comm/communicator.h"

namespace ringreduce {

/// Runs `call` as the communicator's next collective. An allgather's result goes to `work`.
void run_across(Core& core, const Call& call, Work& work, const Interrupted& interrupted);

}  // namespace ringreduce
