// What reduce() must compute, written slowly and from the definitions: one element at a time, with
// none of the code under test. Knows nothing of arrays, formats or vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "base/op.h"

namespace ringreduce::model {

// ---- Operations

// float is computed in double and rounded, which is exact for a single +, -, * or /.
template <class T>
using Exact = std::conditional_t<std::is_same_v<T, float>, double, T>;

template <class T>
T add(T a, T b) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<__int128>(a) + b);
  return static_cast<T>(Exact<T>(a) + Exact<T>(b));
}

template <class T>
T multiply(T a, T b) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<__int128>(a) * b);
  return static_cast<T>(Exact<T>(a) * Exact<T>(b));
}

template <class T>
T divide(T a, int size) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<__int128>(a) / size);
  return static_cast<T>(Exact<T>(a) / Exact<T>(size));
}

template <class T>
bool is_nan(T value) {
  if constexpr (std::is_floating_point_v<T>) return std::isnan(value);
  return false;
}

template <class T>
T combine(Op op, T a, T b) {
  switch (op) {
    case Op::sum:
    case Op::avg:
      return add(a, b);
    case Op::prod:
      return multiply(a, b);
    case Op::min:
      return is_nan(a) || a < b ? a : b;
    case Op::max:
      return is_nan(a) || a > b ? a : b;
  }
  return a;
}

template <class T>
std::complex<T> combine(Op op, std::complex<T> a, std::complex<T> b) {
  if (op != Op::prod) return {add(a.real(), b.real()), add(a.imag(), b.imag())};
  return {add(multiply(a.real(), b.real()), -multiply(a.imag(), b.imag())),
          add(multiply(a.real(), b.imag()), multiply(a.imag(), b.real()))};
}

inline bool combine(Op op, bool a, bool b) {
  return op == Op::sum || op == Op::max ? a || b : a && b;
}

template <class T>
std::complex<T> divide(std::complex<T> a, int size) {
  return {divide(a.real(), size), divide(a.imag(), size)};
}

inline bool divide(bool a, int) { return a; }

// The value of a 16-bit float with `fraction_bits`, by definition.
inline float decode(uint16_t bits, int fraction_bits) {
  const int exponent_bits = 15 - fraction_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  double magnitude;
  if (exponent == (1 << exponent_bits) - 1) {
    magnitude = fraction ? std::nan("") : HUGE_VAL;
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - bias - fraction_bits);
  } else {
    magnitude = std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  }
  return static_cast<float>(bits & 0x8000 ? -magnitude : magnitude);
}

// The nearest 16-bit float: the value counted in units of its last place, rounded to even.
inline uint16_t encode(float value, int fraction_bits) {
  const int exponent_bits = 15 - fraction_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int infinity = ((1 << exponent_bits) - 1) << fraction_bits;
  const int sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return static_cast<uint16_t>(infinity + 1);
  if (std::isinf(value)) return static_cast<uint16_t>(sign + infinity);
  if (value == 0) return static_cast<uint16_t>(sign);
  const double magnitude = std::fabs(static_cast<double>(value));
  const int exponent = std::max(std::ilogb(magnitude), 1 - bias);
  const double units = std::nearbyint(std::ldexp(magnitude, fraction_bits - exponent));
  const int bits = ((exponent + bias - 1) << fraction_bits) + static_cast<int>(units);
  return static_cast<uint16_t>(sign + std::min(bits, infinity));
}

template <class T>
bool same_bits(T a, T b) {
  return (is_nan(a) && is_nan(b)) || memcmp(&a, &b, sizeof(T)) == 0;
}
template <class T>
bool same_bits(std::complex<T> a, std::complex<T> b) {
  return same_bits(a.real(), b.real()) && same_bits(a.imag(), b.imag());
}

// ---- The dtypes: what is stored, what it is computed in

template <class T>
struct Plain {
  using Stored = T;
  using Partial = T;
  static T load(T stored) { return stored; }
  static T store(T value) { return value; }
  static bool same(T a, T b) { return same_bits(a, b); }
};

struct Truth {
  using Stored = uint8_t;
  using Partial = uint8_t;
  static bool load(uint8_t stored) { return stored != 0; }
  static uint8_t store(bool value) { return value; }
  static bool same(uint8_t a, uint8_t b) { return a == b; }
};

template <int fraction_bits>
struct Half {
  using Stored = uint16_t;
  using Partial = float;
  static float load(uint16_t stored) { return decode(stored, fraction_bits); }
  static float load(float partial) { return partial; }
  static uint16_t store(float value) { return encode(value, fraction_bits); }
  static bool same(float a, float b) { return same_bits(a, b); }
  static bool same(uint16_t a, uint16_t b) {
    return a == b || (std::isnan(load(a)) && std::isnan(load(b)));
  }
};

}  // namespace ringreduce::model
