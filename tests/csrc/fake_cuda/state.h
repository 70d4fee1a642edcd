// What the parts of the fake runtime share: its streams, captures and errors. Everything here is
// guarded by one mutex, except where it says otherwise.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

namespace fake_cuda {

using Operation = std::function<void()>;

/// How far a stream is; outlives it in events.
struct Progress {
  uint64_t enqueued = 0, done = 0;
};

/// A graph that is being recorded.
struct Capture {
  std::vector<Operation> operations;
  CUstream_st* origin = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  bool active = true, invalidated = false;
  struct Member {
    uint64_t operations = 0, joined = 0;
  };
  std::map<CUstream_st*, Member> members;
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::set<CUstream_st*> streams;
  std::map<int, CUstream_st*> default_streams;  // by device
  std::set<std::shared_ptr<Capture>> captures;
  std::map<int, int> busy_processors;  // by device
};
/// Never destroyed: streams may still run when the program ends.
State& state();

/// Remembers an error for cudaGetLastError, and passes it on.
cudaError_t note(cudaError_t error);

/// cudaSuccess, or why no call can work in this process or thread.
cudaError_t usable();

/// cudaSuccess, unless a capture forbids calls like this one, which it then ruins.
cudaError_t allowed_in_capture();

int current_device();

/// Notes that the calling thread has a context on its device from now on.
void make_context();

/// Enqueues; or records, if the stream is being captured. `stream` as users write it.
cudaError_t put(cudaStream_t stream, Operation operation);

/// Waits until everything on the device is done.
void synchronize(int device);

}  // namespace fake_cuda

struct CUstream_st {
  int device = 0;
  unsigned id = 0;  // no other stream's, ever
  bool blocking = true;
  bool closing = false;
  std::shared_ptr<fake_cuda::Progress> progress = std::make_shared<fake_cuda::Progress>();
  std::deque<fake_cuda::Operation> queue;
  std::shared_ptr<fake_cuda::Capture> capture;
  std::thread worker;
};

struct CUevent_st {
  std::shared_ptr<fake_cuda::Progress> progress;  // of the stream on which it was recorded
  uint64_t ticket = 0;
  int device = 0;
  std::shared_ptr<fake_cuda::Capture> capture;  // recorded there instead
  CUstream_st* captured_stream = nullptr;
  uint64_t captured_operations = 0;
};

struct CUgraph_st {
  std::vector<fake_cuda::Operation> operations;
};
struct CUgraphExec_st {
  std::shared_ptr<std::vector<fake_cuda::Operation>> operations;
};
