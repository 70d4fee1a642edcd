// Op: how elements of different ranks are combined, and which dtypes it is defined for.
// The numbers are part of the Python interface and never change. The arithmetic is in reduce/.
#pragma once

#include <cstdint>

#include "base/device.h"
#include "base/dtype.h"

namespace ringreduce {

enum class Op : uint8_t { sum = 0, avg = 1, min = 2, max = 3, prod = 4 };

inline constexpr int num_ops = 5;

constexpr const char* name_of(Op op) {
  switch (op) {
    case Op::sum:
      return "sum";
    case Op::avg:
      return "avg";
    case Op::min:
      return "min";
    case Op::max:
      return "max";
    case Op::prod:
      return "prod";
  }
  return "unknown op";
}

// Complex numbers have no order, and truth values have no average.
RR_HOST_DEVICE constexpr bool supports(Op op, Dtype dtype) {
  const bool is_complex = dtype == Dtype::c64 || dtype == Dtype::c128;
  if (op == Op::min || op == Op::max) return !is_complex;
  if (op == Op::avg) return dtype != Dtype::boolean;
  return true;
}

}  // namespace ringreduce
