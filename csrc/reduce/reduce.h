// The arithmetic of all collectives on the CPU: combine n source arrays, element by element and in
// the order given, and store the result to any number of targets. Knows nothing of ranks' memory,
// of threads or of who waits for whom.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/dtype.h"
#include "base/op.h"

namespace ringreduce {

enum class Format : uint8_t {
  storage,  // what the user's tensors hold: finished values
  partial,  // what unfinished sums are kept and sent in: float32 for the 16-bit floats, otherwise
            // the same type as storage
};

constexpr size_t size_of(Dtype dtype, Format format) {
  return format == Format::partial ? partial_size_of(dtype) : size_of(dtype);
}

struct Source {
  const void* data;
  Format format;
  /// The bytes are not needed any more, and only their writer comes back to them: see take().
  bool take = false;
};

struct Target {
  void* data;
  Format format;
};

struct Reduction {
  Dtype dtype;
  Op op;
  int size;  // ranks that take part, >= 1: the divisor of avg
};

// For every i in [0, count): value = sources[0][i] op sources[1][i] op ..., from left to right, in
// the partial format's type. A partial target gets the value. A storage target gets the finished
// result: for avg the value divided once by `size`, for 16-bit floats rounded once.
//
// - Integers wrap; their avg is the wrapped sum divided toward zero.
// - Floating min and max: a NaN in any source makes the result NaN; of several, any of them.
// - bool: sum and max are "or", prod and min are "and"; results are 0 or 1.
// - The order of operations, hence every bit of the result, depends neither on count, addresses
//   nor the CPU (a NaN's sign and payload excepted).
//
// At least one source; supports(op, dtype) must hold. Any alignment. A target may be exactly one of
// the sources (same address, same element size) that is not to be taken; any other overlap is
// undefined. Does not throw.
void reduce(const Reduction& reduction, std::span<const Target> targets,
            std::span<const Source> sources, size_t count);

// The instruction set chosen for this CPU when first asked: "x86-64-v4", "x86-64-v3" or "baseline".
const char* isa_name();

}  // namespace ringreduce
