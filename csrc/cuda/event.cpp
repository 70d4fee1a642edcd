// Moments on streams, what streams record, and what there is on this machine.
#include "cuda/gpu.h"
#include "cuda/runtime.h"

#ifndef RR_CUDA_BUILT
#define RR_CUDA_BUILT "unknown version"
#endif

namespace ringreduce::cuda {
namespace {

class CudaEvent : public Event {
 public:
  CudaEvent(int device, void* stream) : device_(device) {
    const OnDevice on(device);
    require(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cannot make an event");
    const cudaError_t error = cudaEventRecord(event_, as_stream(stream));
    if (error != cudaSuccess) cudaEventDestroy(event_);
    require(error, "cannot record an event");
  }
  ~CudaEvent() override { cudaEventDestroy(event_); }

  bool done() override {
    const Unrecorded unrecorded;
    const cudaError_t error = cudaEventQuery(event_);
    if (error == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    require(error, "the device failed");
    return true;
  }

  void hold_back(void* stream) override {
    const OnDevice on(device_);
    require(cudaStreamWaitEvent(as_stream(stream), event_, 0), "a stream cannot wait");
  }

 private:
  const int device_;
  cudaEvent_t event_ = nullptr;
};

}  // namespace

About about() {
  About about;
  about.built = RR_CUDA_BUILT;
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  about.runtime = "runtime " + version(runtime) + ", " +
                  (driver == 0 ? "no driver" : "driver " + version(driver));
  const cudaError_t error = cudaGetDeviceCount(&about.devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    about.devices = 0;
    // Its own words for it are that the driver's version is insufficient.
    about.unavailable = driver == 0 ? "no driver for GPUs" : cudaGetErrorString(error);
  } else if (about.devices == 0) {
    about.unavailable = "no device";
  }
  return about;
}

void settle(int device) {
  thread_local int settled = -1;
  if (settled == device) return;
  require(cudaSetDevice(device), "cannot use the tensor's device");  // first: others choose it
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  settled = device;
}

std::shared_ptr<void> borrow(int device) {
  struct Borrowed {
    explicit Borrowed(int device) : on(device) {}
    OnDevice on;
    Unrecorded unrecorded;
  };
  return std::make_shared<Borrowed>(device);
}

bool capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(as_stream(stream), &status);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

std::shared_ptr<Event> record(int device, void* stream) {
  return std::make_shared<CudaEvent>(device, stream);
}

}  // namespace ringreduce::cuda
