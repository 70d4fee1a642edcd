// What tests of kernels reduce: random elements of every dtype, what the CPU makes of them, and
// when two results count as the same.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "base/half.h"
#include "reduce/reduce.h"

namespace ringreduce::cuda {

using Random = std::mt19937_64;

inline bool is_nan(Dtype dtype, const char* element) {
  if (dtype == Dtype::f32 || dtype == Dtype::c64) {
    float value;
    std::memcpy(&value, element, sizeof(value));
    return value != value;
  }
  if (dtype == Dtype::f64 || dtype == Dtype::c128) {
    double value;
    std::memcpy(&value, element, sizeof(value));
    return value != value;
  }
  uint16_t bits;
  if (dtype != Dtype::f16 && dtype != Dtype::bf16) return false;
  std::memcpy(&bits, element, sizeof(bits));
  return (bits & 0x7fff) > (dtype == Dtype::f16 ? 0x7c00 : 0x7f80);
}

/// Zeros of complex numbers' parts have the sign of the order of multiplications.
inline bool are_zeros(Dtype dtype, const char* a, const char* b) {
  if (dtype != Dtype::c64 && dtype != Dtype::c128) return false;
  const size_t part = size_of(dtype) / 2;
  for (size_t i = 0; i + 1 < part; ++i) {
    if (a[i] != 0 || b[i] != 0) return false;
  }
  return ((a[part - 1] | b[part - 1]) & 0x7f) == 0;
}

/// A NaN's bits may differ.
inline bool same(Dtype dtype, const std::vector<char>& a, const std::vector<char>& b) {
  if (a == b) return true;
  const bool is_complex = dtype == Dtype::c64 || dtype == Dtype::c128;
  const size_t part = size_of(dtype) / (is_complex ? 2 : 1);
  for (size_t at = 0; at < a.size(); at += part) {
    if (std::memcmp(&a[at], &b[at], part) == 0 || are_zeros(dtype, &a[at], &b[at])) continue;
    if (!is_nan(dtype, &a[at]) || !is_nan(dtype, &b[at])) return false;
  }
  return true;
}

/// Any bits for integers and truth values; for floats numbers of all sizes, and now and then a NaN.
inline std::vector<char> random_bytes(Dtype dtype, size_t count, Random& random) {
  std::vector<char> bytes(count * size_of(dtype));
  for (char& byte : bytes) byte = static_cast<char>(random());
  const auto put = [&](auto value, size_t index) {
    std::memcpy(&bytes[index * sizeof(value)], &value, sizeof(value));
  };
  const bool floats = dtype == Dtype::f32 || dtype == Dtype::c64;
  const bool doubles = dtype == Dtype::f64 || dtype == Dtype::c128;
  std::uniform_real_distribution<float> uniform(-4, 4);
  if (floats) {
    for (size_t i = 0; i < bytes.size() / 4; ++i) {
      if (random() % 256 != 0) put(uniform(random), i);
    }
  } else if (doubles) {
    for (size_t i = 0; i < bytes.size() / 8; ++i) {
      if (random() % 256 != 0) put(double{uniform(random)} / 3, i);
    }
  }
  return bytes;
}

/// Sums, and products of up to eight of them, are exact in every dtype, in any order.
inline std::vector<char> small_integers(Dtype dtype, size_t count, Random& random) {
  std::vector<char> bytes(count * size_of(dtype));
  const auto put = [&](size_t index, auto value) {
    std::memcpy(&bytes[index * sizeof(value)], &value, sizeof(value));
  };
  const size_t parts = dtype == Dtype::c64 || dtype == Dtype::c128 ? 2 : 1;
  for (size_t i = 0; i < count * parts; ++i) {
    const int value = static_cast<int>(random() % 4) - 1;
    switch (dtype) {
      case Dtype::f64:
      case Dtype::c128:
        put(i, double(value));
        break;
      case Dtype::f32:
      case Dtype::c64:
        put(i, float(value));
        break;
      case Dtype::f16:
        put(i, to_f16(static_cast<float>(value)));
        break;
      case Dtype::bf16:
        put(i, to_bf16(static_cast<float>(value > 1 ? 1 : value)));
        break;
      case Dtype::i64:
        put(i, int64_t{value});
        break;
      case Dtype::i32:
        put(i, int32_t{value});
        break;
      case Dtype::i16:
        put(i, static_cast<int16_t>(value));
        break;
      case Dtype::i8:
      case Dtype::u8:
      case Dtype::boolean:
        put(i, static_cast<int8_t>(value));
        break;
    }
  }
  return bytes;
}

inline std::vector<char> expected(Dtype dtype, Op op, size_t count,
                                  const std::vector<std::vector<char>>& inputs) {
  std::vector<char> result(count * size_of(dtype));
  std::vector<Source> sources;
  for (const auto& input : inputs) sources.push_back({input.data(), Format::storage});
  const Target target{result.data(), Format::storage};
  reduce({dtype, op, static_cast<int>(inputs.size())}, {&target, 1}, sources, count);
  return result;
}

}  // namespace ringreduce::cuda
