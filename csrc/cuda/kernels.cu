// The kernels, and how the host starts them. Each algorithm is a header of algorithms/; what is
// here is one kernel per algorithm and dtype, and how many blocks a call takes.
#include <algorithm>
#include <type_traits>

#include "algorithms/one_shot.h"
#include "algorithms/ring.h"
#include "algorithms/tree.h"
#include "algorithms/two_shot.h"
#include "cuda/kernels.h"
#include "cuda/runtime.h"
#include "cuda/slab.h"
#include "cuda/staged.cuh"
#include "cuda/team.cuh"
#include "cuda/window.cuh"
#include "cuda/wire.cuh"

namespace ringreduce::cuda {
namespace {

/// Of 512 threads, so that 128 registers are there for each. Derived, not measured, like all
/// constants here.
constexpr int threads_per_block = 512;

template <class Stored>
__global__ void __launch_bounds__(threads_per_block, 1)
    one_shot_kernel(const __grid_constant__ DeviceCall call) {
  Team team(call);
  OneShotWindow<Stored> window(team, call);
  one_shot_allreduce(window, call.count);
  team.leave();
}

template <class Stored>
__global__ void __launch_bounds__(threads_per_block, 1)
    staged_kernel(const __grid_constant__ DeviceCall call) {
  Team team(call);
  Staged<Stored> staged(team, call);
  staged_rounds(staged, staged.rounds(), Staged<Stored>::lead);
  staged.finish();
  team.leave();
}

template <class Stored>
__global__ void __launch_bounds__(threads_per_block, 1)
    two_shot_kernel(const __grid_constant__ DeviceCall call) {
  Team team(call);
  TwoShotWindow<Stored> window(team, call);
  if (window.arrive()) two_shot_allreduce(window);
  team.leave();
}

/// What a block of a ring or tree has of the message, and in which chunks it carries that: so many
/// that the links carry one while another one is being added, but not smaller than what all
/// threads move at once.
struct Stripe {
  Chunk chunk;
  size_t piece;
};

template <class Stored>
__device__ Stripe stripe_of(const Team& team, const DeviceCall& call, size_t parts) {
  constexpr size_t granule = granule_of(sizeof(Stored));
  constexpr size_t least = threads_per_block * lanes<Stored>;
  const Chunk stripe = Blocks::even(call.count, team.blocks(), granule)[team.block()];
  const size_t wanted = round_up((stripe.length + parts - 1) / parts, granule);
  const size_t piece = wanted > least ? wanted : least;
  return {stripe, piece < slot_elements<Stored> ? piece : slot_elements<Stored>};
}

template <class Stored>
__global__ void __launch_bounds__(threads_per_block, 1)
    ring_kernel(const __grid_constant__ DeviceCall call) {
  constexpr size_t ring_lanes = 2;
  static_assert(ring_slots > ring_lanes);
  Team team(call);
  team.announce();
  if (team.met()) {
    const auto parts = ring_lanes * static_cast<size_t>(call.size);
    const Stripe stripe = stripe_of<Stored>(team, call, parts);
    const Blocks blocks = Blocks::even(stripe.chunk.length, call.size, granule_of(sizeof(Stored)));
    Wire<Stored> wire(team, call, stripe.chunk, false);
    ring_allreduce(wire, Ring{call.rank, call.size}, blocks, stripe.piece, ring_lanes);
  }
  team.leave();
}

template <class Stored>
__global__ void __launch_bounds__(threads_per_block, 1)
    tree_kernel(const __grid_constant__ DeviceCall call) {
  constexpr size_t chunks = 16;  // both halves
  static_assert(tree_slots >= 2);
  Team team(call);
  team.announce();
  if (team.met()) {
    const Stripe stripe = stripe_of<Stored>(team, call, chunks);
    Wire<Stored> wire(team, call, stripe.chunk, true);
    tree_allreduce(wire, call.rank, call.size, stripe.chunk.length, stripe.piece);
  }
  team.leave();
}

/// Partial sums alone; element by element, as only nodes of several ranks have any, of 16-bit
/// floats.
template <class Stored, bool finished>
__device__ void combine_partials(const DeviceCall& call, const Mixed& mixed, size_t count) {
  using Partial = PartialOf<Stored>;
  with_operation<Stored>(call.op, [&](auto operation) {
    const auto* const first = reinterpret_cast<const Partial*>(mixed.partials[0]);
    const auto* const second = reinterpret_cast<const Partial*>(mixed.partials[1]);
#pragma unroll 1
    for (size_t i = threadIdx.x; i < count; i += blockDim.x) {
      const Partial sum = second ? decltype(operation)::of(first[i], second[i]) : first[i];
      const auto result = mixed_result<Stored, finished>(sum, call.divisor);
      for (int t = 0; t < mixed.num_targets; ++t) {
        reinterpret_cast<MixedResult<Stored, finished>*>(mixed.targets[t])[i] = result;
      }
    }
  });
}

template <class Stored, bool finished>
__device__ void combine(const DeviceCall& call, const Mixed& mixed, size_t count) {
  if (mixed.own) {
    reduce_mixed<Stored, finished>(call.op, call.divisor, mixed, count);
  } else {
    combine_partials<Stored, finished>(call, mixed, count);
  }
}

/// Its blocks take one share each.
template <class Stored>
__global__ void __launch_bounds__(threads_per_block, 1)
    combine_kernel(const __grid_constant__ DeviceCall call) {
  const Blocks shares =
      Blocks::even(call.count, static_cast<int>(gridDim.x), granule_of(sizeof(Stored)));
  const Chunk share = shares[static_cast<int>(blockIdx.x)];
  const size_t partial_offset = share.offset * sizeof(PartialOf<Stored>);
  const size_t stored_offset = share.offset * sizeof(Stored);
  Mixed mixed;
  for (; mixed.num_partials < call.num_partials; ++mixed.num_partials) {
    mixed.partials[mixed.num_partials] = call.inputs[mixed.num_partials] + partial_offset;
  }
  if (call.input) mixed.own = call.input + stored_offset;
  for (; mixed.num_targets < call.num_outputs; ++mixed.num_targets) {
    mixed.targets[mixed.num_targets] =
        call.outputs[mixed.num_targets] + (call.finished ? stored_offset : partial_offset);
  }
  if (call.finished) {
    combine<Stored, true>(call, mixed, share.length);
  } else {
    combine<Stored, false>(call, mixed, share.length);
  }
}

// ---- Which kernel

using Entry = void (*)(DeviceCall);

/// What a kernel is made for: sums of complex numbers are sums of their parts.
struct Elements {
  Dtype dtype;
  size_t parts;  // per element of the message
};

Elements elements_of(const DeviceCall& call) {
  const bool adds = call.op == Op::sum || call.op == Op::avg;
  if (adds && call.dtype == Dtype::c64) return {Dtype::f32, 2};
  if (adds && call.dtype == Dtype::c128) return {Dtype::f64, 2};
  return {call.dtype, 1};
}

template <class Stored>
Entry entry_for(Kernel kernel) {
  switch (kernel) {
    case Kernel::one_shot:
      if constexpr (sizeof(Stored) <= line_data_bytes) return one_shot_kernel<Stored>;
      break;
    case Kernel::two_shot:
      return two_shot_kernel<Stored>;
    case Kernel::staged:
      return staged_kernel<Stored>;
    case Kernel::ring:
      return ring_kernel<Stored>;
    case Kernel::tree:
      return tree_kernel<Stored>;
    case Kernel::combine:
      return combine_kernel<Stored>;
  }
  return nullptr;
}

Entry entry_of(Kernel kernel, Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return entry_for<double>(kernel);
    case Dtype::f32:
      return entry_for<float>(kernel);
    case Dtype::f16:
      return entry_for<f16>(kernel);
    case Dtype::bf16:
      return entry_for<bf16>(kernel);
    case Dtype::i64:
      return entry_for<int64_t>(kernel);
    case Dtype::i32:
      return entry_for<int32_t>(kernel);
    case Dtype::i16:
      return entry_for<int16_t>(kernel);
    case Dtype::i8:
      return entry_for<int8_t>(kernel);
    case Dtype::u8:
      return entry_for<uint8_t>(kernel);
    case Dtype::boolean:
      return entry_for<Bool>(kernel);
    case Dtype::c64:
      return entry_for<Complex<float>>(kernel);
    case Dtype::c128:
      return entry_for<Complex<double>>(kernel);
  }
  return nullptr;
}

/// What one_shot's lines cannot hold is staged; so is what a ring or tree of one rank would do.
Kernel actual(Kernel kernel, const DeviceCall& call) {
  const Elements elements = elements_of(call);
  if (kernel == Kernel::one_shot && size_of(elements.dtype) > line_data_bytes) {
    return Kernel::staged;
  }
  const bool is_wire = kernel == Kernel::ring || kernel == Kernel::tree;
  return is_wire && call.size == 1 ? Kernel::staged : kernel;
}

/// How many blocks a message takes. Few when it is small: each of them meets its peers.
struct Size {
  size_t bytes_per_block;
  int most_blocks;
};
constexpr int num_kernels = 6;
constexpr Size sizes[num_kernels] = {
    {threads_per_block * line_data_bytes, 16},  // one_shot: one line to a thread
    {size_t{16} << 10, 36},                     // two_shot
    {size_t{16} << 10, 36},                     // staged
    {size_t{32} << 10, 24},                     // ring
    {size_t{32} << 10, 24},                     // tree
    {size_t{16} << 10, 36},                     // combine
};
static_assert(sizes[3].most_blocks <= max_wire_blocks);

}  // namespace

size_t slab_bytes(int ranks, bool wire) {
  return Slab::fifos_offset(ranks) + (wire ? Slab::fifos_bytes() : 0);
}

int most_blocks(int sharers) {
  int device = 0, processors = 0, fewest = max_blocks;
  require(cudaGetDevice(&device), "no current device");
  require(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "the device does not tell its size");
  for (int number = 0; number < num_kernels * num_dtypes; ++number) {
    const Entry entry =
        entry_of(static_cast<Kernel>(number / num_dtypes), static_cast<Dtype>(number % num_dtypes));
    if (!entry) continue;
    int per_processor = 0;
    require(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                &per_processor, reinterpret_cast<const void*>(entry), threads_per_block, 0),
            "the kernels cannot be loaded");
    fewest = std::min(fewest, per_processor * processors / sharers);
  }
  return fewest;
}

int blocks_of(Kernel kernel, const DeviceCall& call, int most) {
  const Size size = sizes[static_cast<int>(actual(kernel, call))];
  const size_t bytes = call.count * size_of(call.dtype);
  const size_t wanted = (bytes + size.bytes_per_block - 1) / size.bytes_per_block;
  const auto limit = static_cast<size_t>(std::min(size.most_blocks, most));
  return static_cast<int>(std::clamp<size_t>(wanted, 1, limit));
}

void launch(Kernel kernel, const DeviceCall& call, int blocks, void* stream) {
  DeviceCall made = call;
  const Elements elements = elements_of(call);
  made.dtype = elements.dtype;
  made.count *= elements.parts;
  for (size_t& offset : made.offsets) offset *= elements.parts;
  const Entry entry = entry_of(actual(kernel, call), made.dtype);
  void* arguments[] = {&made};
  require(
      cudaLaunchKernel(reinterpret_cast<const void*>(entry), dim3(static_cast<unsigned>(blocks)),
                       dim3(threads_per_block), arguments, 0, as_stream(stream)),
      "a kernel cannot be launched");
}

}  // namespace ringreduce::cuda
