// The kernels, and how the host starts them. Each algorithm is a header of algorithms/; what is
// here is one kernel per algorithm and dtype, and how many blocks a call takes.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "algorithms/two_shot.h"
#include "base/error.h"
#include "cuda/kernels.h"
#include "cuda/slab.h"
#include "cuda/team.cuh"
#include "cuda/window.cuh"

namespace ringreduce::cuda {
namespace {

/// Of 512 threads, so that 128 registers are there for each. Derived, not measured, like all
/// constants here.
constexpr int threads_per_block = 512;

template <class Stored>
__global__ void __launch_bounds__(threads_per_block, 1)
    two_shot_kernel(const __grid_constant__ DeviceCall call) {
  Team team(call);
  TwoShotWindow<Stored> window(team, call);
  if (window.arrive()) two_shot_allreduce(window);
  team.leave();
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
    case Kernel::two_shot:
      return two_shot_kernel<Stored>;
    default:
      break;
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

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw Error(ErrorCode::resource, std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace

size_t slab_bytes(int ranks, bool wire) {
  return Slab::fifos_offset(ranks) + (wire ? Slab::fifos_bytes() : 0);
}

int most_blocks(int sharers) {
  int device = 0, processors = 0, fewest = max_blocks;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "the device does not tell its size");
  for (int dtype = 0; dtype < num_dtypes; ++dtype) {
    for (Kernel kernel : {Kernel::two_shot}) {
      int per_processor = 0;
      const Entry entry = entry_of(kernel, static_cast<Dtype>(dtype));
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                &per_processor, reinterpret_cast<const void*>(entry), threads_per_block, 0),
            "the kernels cannot be loaded");
      fewest = std::min(fewest, per_processor * processors / sharers);
    }
  }
  return fewest;
}

int blocks_of(Kernel kernel, const DeviceCall& call, int most) {
  (void)kernel;
  constexpr size_t least_bytes_per_block = size_t{16} << 10;
  const size_t wanted = call.count * size_of(call.dtype) / least_bytes_per_block + 1;
  return static_cast<int>(std::min<size_t>({wanted, 36, static_cast<size_t>(most)}));
}

void launch(Kernel kernel, const DeviceCall& call, int blocks, void* stream) {
  DeviceCall made = call;
  const Elements elements = elements_of(call);
  made.dtype = elements.dtype;
  made.count *= elements.parts;
  for (size_t& offset : made.offsets) offset *= elements.parts;
  void* arguments[] = {&made};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(entry_of(kernel, made.dtype)),
                         dim3(static_cast<unsigned>(blocks)), dim3(threads_per_block), arguments, 0,
                         static_cast<cudaStream_t>(stream)),
        "a kernel cannot be launched");
}

}  // namespace ringreduce::cuda
