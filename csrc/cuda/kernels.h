// What the host and the kernels of the GPU agree on: the arguments of a call, the status that the
// two tell each other, and how a kernel is launched. Needs no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/chunk.h"
#include "base/dtype.h"
#include "base/op.h"
#include "reduce/reduce.h"

namespace ringreduce::cuda {

/// Ranks of one node that kernels can join.
inline constexpr int max_ranks = 32;

/// Larger messages do not fit into one_shot's inboxes.
inline constexpr size_t one_shot_largest_bytes = size_t{64} << 10;

/// Nor do larger items travel in its lines.
inline constexpr size_t one_shot_largest_item_bytes = 8;

/// Which kernel runs. `staged` is two_shot over tensors in private memory, and also all collectives
/// that are halves of it. `combine` is this rank's alone and waits for nobody: at most two arrays
/// of partial sums, then its own input, become partial sums or results.
enum class Kernel : int { one_shot, two_shot, staged, ring, tree, combine };

/// What a rank's kernels found wrong; the first one to find something writes it.
enum class Trouble : uint32_t { none = 0, timeout = 1, mismatch = 2 };

/// Host memory that both sides see, one per rank and communicator.
struct Status {
  // Written by the host.
  uint32_t abort;  // not 0: every kernel leaves, and moves no more data

  // Written by kernels, both at once. After a timeout, or an abort that a kernel has seen, kernels
  // move no more data. A mismatch harms only its own call; the host may go on.
  alignas(8) uint32_t trouble;  // a Trouble
  uint32_t peer;                // rank that did not come, or came with something else

  // The number of the call that has begun last, and of the one that has left last, modulo 2^32, as
  // the first block of each kernel has it. Equal: none is under way.
  uint32_t begun, left;
};

/// How the message is divided among ranks (chunk.h); a kernel makes its Blocks of it.
enum class Division : int { even, table, single };

/// The one argument of every kernel.
struct DeviceCall {
  int rank, size;
  Dtype dtype;
  Op op;
  uint32_t digest;         // of what all ranks must agree on
  uint64_t timeout_ns;     // a kernel that has waited for so long leaves, and says for whom
  Status* status;          // as the device sees it
  char* slabs[max_ranks];  // every rank's slab, as this rank's device sees it

  // The message. reduce_scatter: output holds this rank's part alone; allgather: input does.
  // A broadcast is an allgather and a reduce a reduce_scatter whose division is single.
  size_t count;  // elements of the whole message
  const char* input;
  char* output;
  bool reduces, gathers;  // staged: reduce_scatter, allgather, or with both allreduce
  Division division;
  int owner;                      // single
  size_t offsets[max_ranks + 1];  // table: elements

  // two_shot: where every rank's tensors lie, as this rank's device sees them.
  const char* inputs[max_ranks];
  char* outputs[max_ranks];

  // combine: `inputs` are the arrays of partial sums. `input`, if any, is of the tensor's own type,
  // as `outputs` are if they are results.
  int num_partials, num_outputs;
  bool finished;
  int divisor;  // of results: what avg divides by
};
static_assert(sizeof(DeviceCall) <= 4096);  // what a kernel's arguments may take

/// Bytes of the memory that each rank lends to the others' kernels. All zero before the first call.
/// `wire`: with room for ring and tree.
size_t slab_bytes(int ranks, bool wire);

/// Blocks per kernel such that the kernels of `sharers` ranks are on the current device all at
/// once: kernels that wait for each other must be. At least 1, or 0 if not even that is possible.
int most_blocks(int sharers);

/// How many blocks a call takes: a pure function of its arguments, so equal on all ranks.
/// `most`: the smallest most_blocks() of all ranks.
int blocks_of(Kernel kernel, const DeviceCall& call, int most);

/// Enqueues the call on a stream (cudaStream_t) of the current device. Throws ErrorCode::resource.
void launch(Kernel kernel, const DeviceCall& call, int blocks, void* stream);

}  // namespace ringreduce::cuda
