// One collective from header to result: lets the ranks meet, chooses the algorithm, runs it over
// window or wire, and turns what went wrong into an Error.
#pragma once

#include <vector>

#include "comm/communicator.h"

namespace ringreduce {

/// Runs `call` as the communicator's next collective. An allgather's result goes to `work`.
void run_collective(Core& core, const Call& call, Work& work, const Interrupted& interrupted);

/// The same for tensors in host memory, as a step of a collective: without records of it.
void run_on_host(Core& core, const Call& call, Work& work, const Interrupted& interrupted);

/// An allgather's result, for the rows that work.counts has. Returns where each rank's part begins
/// in it, in elements, and the end.
std::vector<size_t> allocate_output(Work& work, size_t row_elements, size_t item_bytes);

/// Collective: all ranks meet and then extend the arena. `device`: -1 for memory of the host.
std::shared_ptr<Block> run_allocate(Core& core, size_t size_bytes, int device,
                                    const Interrupted& interrupted);

/// Throws MismatchError's text: who called what. `headers`: of all ranks, in order.
[[noreturn]] void throw_mismatch(const Core& core, const std::vector<Header>& headers);

/// Throws what ended the communicator, during this collective or another one.
[[noreturn]] void throw_aborted(const Core& core, const Header& header);
[[noreturn]] void throw_aborted(const Core& core, const std::string& during);

}  // namespace ringreduce
