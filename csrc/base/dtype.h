// Dtype: what the elements of a tensor are. The numbers are part of the Python interface and of the
// headers that ranks compare, so they never change. Conversions and arithmetic live elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/device.h"

namespace ringreduce {

enum class Dtype : uint8_t {
  f64 = 0,
  f32 = 1,
  f16 = 2,   // IEEE binary16
  bf16 = 3,  // the upper half of a float32
  i64 = 4,
  i32 = 5,
  i16 = 6,
  i8 = 7,
  u8 = 8,
  boolean = 9,  // one byte; any nonzero byte is true
  c64 = 10,     // two float32: real, imaginary
  c128 = 11,    // two float64: real, imaginary
};

inline constexpr int num_dtypes = 12;

// Bytes of one element as the user's tensor holds it.
RR_HOST_DEVICE constexpr size_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::i8:
    case Dtype::u8:
    case Dtype::boolean:
      return 1;
    case Dtype::f16:
    case Dtype::bf16:
    case Dtype::i16:
      return 2;
    case Dtype::f32:
    case Dtype::i32:
      return 4;
    case Dtype::f64:
    case Dtype::i64:
    case Dtype::c64:
      return 8;
    case Dtype::c128:
      return 16;
  }
  return 0;
}

// Bytes of one element of an unfinished sum: float32 for the 16-bit floats, so that only the
// finished result is rounded to 16 bits.
RR_HOST_DEVICE constexpr size_t partial_size_of(Dtype dtype) {
  return dtype == Dtype::f16 || dtype == Dtype::bf16 ? 4 : size_of(dtype);
}

// The name that numpy and torch use.
constexpr const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return "float64";
    case Dtype::f32:
      return "float32";
    case Dtype::f16:
      return "float16";
    case Dtype::bf16:
      return "bfloat16";
    case Dtype::i64:
      return "int64";
    case Dtype::i32:
      return "int32";
    case Dtype::i16:
      return "int16";
    case Dtype::i8:
      return "int8";
    case Dtype::u8:
      return "uint8";
    case Dtype::boolean:
      return "bool";
    case Dtype::c64:
      return "complex64";
    case Dtype::c128:
      return "complex128";
  }
  return "unknown dtype";
}

}  // namespace ringreduce
