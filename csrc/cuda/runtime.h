// How this folder calls CUDA's runtime from the host: errors, the current device, graphs that
// others record meanwhile.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "base/error.h"

namespace ringreduce::cuda {

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next call of anybody begins without it
  throw Error(ErrorCode::resource, std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

/// Makes a device current, and then again the one that was: torch and cupy rely on it.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    require(cudaGetDevice(&before_), "no current device");
    if (before_ != device) require(cudaSetDevice(device), "cannot use the tensor's device");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// While any thread records a graph, looking at events is forbidden to all threads that do not say
/// that they know.
class Unrecorded {
 public:
  Unrecorded() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Unrecorded() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Unrecorded(const Unrecorded&) = delete;
  Unrecorded& operator=(const Unrecorded&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace ringreduce::cuda
