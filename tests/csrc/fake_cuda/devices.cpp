// Devices, errors, and what the fake knows of kernels without running them.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "state.h"

namespace fake_cuda {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local int device_of_thread = 0;

void read(const char* name, int& value) {
  if (const char* const text = std::getenv(name)) value = std::atoi(text);
}

std::mutex peers_mutex;
auto& peers_enabled = *new std::set<std::pair<int, int>>;
std::mutex contexts_mutex;
auto& contexts = *new std::set<int>;  // by device; leaked: threads may come here at the very end

}  // namespace

Machine& machine() {
  static Machine* const made = [] {
    auto* const machine = new Machine;
    int without_peers = 0;
    read("FAKE_CUDA_DEVICES", machine->devices);
    read("FAKE_CUDA_PROCESSORS", machine->processors);
    read("FAKE_CUDA_NO_PEERS", without_peers);
    machine->peers = without_peers == 0;
    return machine;
  }();
  return *made;
}

int current_device() { return device_of_thread; }

void make_context() {
  const std::lock_guard lock(contexts_mutex);
  contexts.insert(current_device());
}

bool used(int device) {
  const std::lock_guard lock(contexts_mutex);
  return contexts.contains(device);
}

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

/// As CUDA, unusable in a child that was forked from a process that used it.
cudaError_t usable() {
  static const int user = getpid();
  if (getpid() != user) return cudaErrorInitializationError;
  return machine().devices > 0 ? cudaSuccess : cudaErrorNoDevice;
}

void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: the fake CUDA: %s\n", what.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

}  // namespace fake_cuda

using namespace fake_cuda;

// ---- Errors

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInitializationError:
      return "cudaErrorInitializationError";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorMapBufferObjectFailed:
      return "cudaErrorMapBufferObjectFailed";
    case cudaErrorPeerAccessUnsupported:
      return "cudaErrorPeerAccessUnsupported";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorIllegalState:
      return "cudaErrorIllegalState";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorPeerAccessAlreadyEnabled:
      return "cudaErrorPeerAccessAlreadyEnabled";
    case cudaErrorPeerAccessNotEnabled:
      return "cudaErrorPeerAccessNotEnabled";
    case cudaErrorHostMemoryAlreadyRegistered:
      return "cudaErrorHostMemoryAlreadyRegistered";
    case cudaErrorHostMemoryNotRegistered:
      return "cudaErrorHostMemoryNotRegistered";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnmatched:
      return "cudaErrorStreamCaptureUnmatched";
    case cudaErrorStreamCaptureUnjoined:
      return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation:
      return "cudaErrorStreamCaptureIsolation";
    case cudaErrorStreamCaptureImplicit:
      return "cudaErrorStreamCaptureImplicit";
    case cudaErrorUnknown:
      return "cudaErrorUnknown";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// ---- Devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = machine().devices;
  return note(usable());
}

cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t error = usable()) return note(error);
  if (device < 0 || device >= machine().devices) return note(cudaErrorInvalidDevice);
  device_of_thread = device;
  make_context();  // at once, since CUDA 12
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  if (const cudaError_t error = usable()) return note(error);
  *device = device_of_thread;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (const cudaError_t error = usable()) return note(error);
  if (device < 0 || device >= machine().devices) return note(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "Fake GPU");
  const unsigned words[] = {machine().uuid_seed, static_cast<unsigned>(device), 0xfa, 0xce};
  std::memcpy(properties->uuid.bytes, words, sizeof(words));
  properties->totalGlobalMem = size_t{8} << 30;
  properties->major = 9;
  properties->multiProcessorCount = machine().processors;
  properties->pciBusID = device + 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (const cudaError_t error = usable()) return note(error);
  if (device < 0 || device >= machine().devices) return note(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = machine().processors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrIpcEventSupport:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrIntegrated:
    case cudaDevAttrComputeMode:
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
  }
  return note(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  if (device < 0 || device >= machine().devices) return note(cudaErrorInvalidDevice);
  std::snprintf(id, static_cast<size_t>(length), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return note(usable());
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  if (const cudaError_t error = usable()) return note(error);
  const int devices = machine().devices;
  if (std::min(device, peer) < 0 || std::max(device, peer) >= devices) {
    return note(cudaErrorInvalidDevice);
  }
  *can = device != peer && machine().peers ? 1 : 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  int can = 0;
  if (const cudaError_t error = cudaDeviceCanAccessPeer(&can, current_device(), peer)) return error;
  if (can == 0) return note(cudaErrorPeerAccessUnsupported);
  const std::lock_guard lock(peers_mutex);
  const bool is_new = peers_enabled.emplace(current_device(), peer).second;
  return is_new ? cudaSuccess : note(cudaErrorPeerAccessAlreadyEnabled);
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  const std::lock_guard lock(peers_mutex);
  const bool was = peers_enabled.erase({current_device(), peer}) == 1;
  return was ? cudaSuccess : note(cudaErrorPeerAccessNotEnabled);
}

// ---- Kernels

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (const cudaError_t error = usable()) return note(error);
  if (!kernel) return note(cudaErrorInvalidValue);
  *attributes = {0, 0, 0, 1024, 128};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int) {
  return kernel ? cudaSuccess : note(cudaErrorInvalidValue);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int,
                                                          size_t) {
  if (const cudaError_t error = usable()) return note(error);
  if (!kernel) return note(cudaErrorInvalidValue);
  *blocks = 1;
  return cudaSuccess;
}
