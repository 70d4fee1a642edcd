// A collective as its caller states it, in memory of this rank, and the header that tells the
// others.
#pragma once

#include <memory>
#include <vector>

#include "base/dtype.h"
#include "base/header.h"
#include "base/layout.h"
#include "base/op.h"
#include "cuda/gpu.h"
#include "reduce/message.h"

namespace ringreduce {

/// One tensor of a call. Null where a rank has none: a reduce's output off root, an allgather's
/// output.
struct Tensor {
  const char* input = nullptr;
  char* output = nullptr;
  Layout input_layout, output_layout;

  /// Elements of the input.
  size_t count() const;
};

struct Call {
  Kind kind = Kind::barrier;
  Op op = Op::sum;
  Dtype dtype = Dtype::f32;
  int root = 0;
  std::vector<Tensor> tensors;  // more than one: allreduce and broadcast only
  size_t bytes = 0;             // allocate only
  bool meets_only = false;      // the ranks compare headers; no data move

  // Of tensors in device memory, which are contiguous, one after the other.
  int device = -1;                          // -1: the host
  void* stream = nullptr;                   // the caller's
  std::shared_ptr<cuda::Event> after = {};  // asynchronous: when the operands are ready
  std::vector<size_t> rows = {};            // allgather: of every rank
  uint64_t segment = 0, input_offset = 0, output_offset = 0;  // as in the header

  Header header(uint64_t sequence) const;
};

/// Offsets of np.array_split(x, size) in elements, for an x of `rows` rows: the first rows % size
/// parts have one row more. size + 1 numbers.
std::vector<size_t> split_rows(size_t rows, size_t row_elements, int size);

/// The call's tensors as one message of contiguous runs. Strided tensors are packed into memory of
/// its own, and unpacked by finish().
class Operands {
 public:
  explicit Operands(const Call& call);
  Message& message() { return message_; }
  size_t count() const { return count_; }
  /// Where this rank's part of the message begins, if not at 0 (see reduce_scatter, allgather).
  void place_outputs_at(size_t offset);
  void place_inputs_at(size_t offset);
  /// A reduce_scatter's: places this rank's outputs, and returns all parts' offsets (split_rows).
  std::vector<size_t> scatter_rows(int rank, int size);
  void set_output(char* data, size_t count);
  /// After success: moves results of strided outputs to their places.
  void finish();

 private:
  const Call& call_;
  Message message_;
  size_t count_ = 0;
  std::vector<std::unique_ptr<char[]>> packed_;
  std::vector<std::pair<size_t, const char*>> unpacking_;  // tensor, packed output
};

}  // namespace ringreduce
