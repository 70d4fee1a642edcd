// One collective: where it runs, what is recorded of it, and the words of what went wrong. How it
// runs is in on_node.cpp, across.cpp and on_gpu.cpp.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "comm/communicator.h"

namespace ringreduce {

/// In elements: blocks end on cache lines, whatever the dtype, so no two ranks write to one.
inline constexpr size_t block_granule = line_bytes;

/// Runs `call` as the communicator's next collective. An allgather's result goes to `work`.
void run_collective(Core& core, const Call& call, Work& work, const Interrupted& interrupted);

/// The same for tensors in host memory, as a step of a collective: without records of it.
void run_on_host(Core& core, const Call& call, Work& work, const Interrupted& interrupted);

/// Collective: all ranks meet and then extend the arena. `device`: -1 for memory of the host.
std::shared_ptr<Block> run_allocate(Core& core, size_t size_bytes, int device,
                                    const Interrupted& interrupted);

/// Collective over all nodes, as a step of another collective: the least of what ranks say.
uint8_t least_of_all(Core& core, uint8_t mine, const Interrupted& interrupted);

/// Throws MismatchError's text: who called what. `headers`: of all ranks, in order.
[[noreturn]] void throw_mismatch(const Core& core, const std::vector<Header>& headers);

/// Throws what ended the communicator, during this collective or another one.
[[noreturn]] void throw_aborted(const Core& core, const Header& header);
[[noreturn]] void throw_aborted(const Core& core, const std::string& during);

/// What ranks set up together once they have met: set_up(deadline), where a rank that gives up ends
/// the waits of the others. A lack of something is told to all of them; else who fails has left, or
/// wants out.
template <class SetUp>
decltype(auto) set_up_together(Core& core, const Header& header, const Interrupted& interrupted,
                               SetUp set_up) {
  GroupWatch watch = core.watch(header, interrupted);
  const std::function<bool()> stop = [&watch] { return watch.stop(); };
  Deadline deadline = Deadline::after_s(core.options.timeout_s);
  deadline.stop = &stop;
  try {
    return set_up(deadline);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::timeout) {  // what is on its way would be taken for the next
      core.group.abort(ErrorCode::timeout, -1, error.what());
    }
    if (error.code() == ErrorCode::resource || !watch.stop()) throw;
    throw_aborted(core, header);
  }
}

}  // namespace ringreduce
