// In place of gpu.cpp and kernels.cu where there was no nvcc: says so.
#include "base/error.h"
#include "cuda/gpu.h"

namespace ringreduce::cuda {

About about() { return {"", "", 0, "built without CUDA"}; }

bool capturing(void*) { return false; }

namespace {

[[noreturn]] void refuse() {
  throw Error(ErrorCode::invalid,
              "this ringreduce was built without CUDA: build it where nvcc is on PATH, or move the "
              "tensor to the CPU");
}

}  // namespace

void settle(int) { refuse(); }

std::shared_ptr<void> borrow(int) { refuse(); }

std::shared_ptr<Event> record(int, void*) { refuse(); }

std::unique_ptr<Gpu> Gpu::open(const Options&, const Exchange&) { refuse(); }

}  // namespace ringreduce::cuda
