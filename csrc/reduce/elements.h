// The arithmetic of single elements, the same bits on CPUs and in CUDA kernels: what a stored
// element counts as, how two of them are combined, how a result is finished. Knows no arrays. All
// of it is always inlined, so that a file built for a newer CPU leaves no copy that others could
// call. To be compiled without contraction of products and sums.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "base/device.h"
#include "base/half.h"

namespace ringreduce {

// ---- Elements

enum class Bool : uint8_t {};

template <class T>
struct Complex {
  T real, imaginary;
};

// What a stored element counts as, and back: 16-bit floats are computed in float32, and any nonzero
// byte is true.
template <class T>
[[gnu::always_inline]] RR_HOST_DEVICE inline T widen(T stored) {
  return stored;
}
[[gnu::always_inline]] RR_HOST_DEVICE inline Bool widen(Bool stored) {
  return Bool(stored != Bool{0});
}
[[gnu::always_inline]] RR_HOST_DEVICE inline float widen(f16 stored) { return to_float(stored); }
[[gnu::always_inline]] RR_HOST_DEVICE inline float widen(bf16 stored) { return to_float(stored); }

// The type in which unfinished values of a stored type are kept.
template <class Stored>
using PartialOf = decltype(widen(std::declval<Stored>()));

template <class Stored>
inline constexpr bool is_half = !std::is_same_v<Stored, PartialOf<Stored>>;

template <class Stored>
[[gnu::always_inline]] RR_HOST_DEVICE inline Stored narrow(PartialOf<Stored> value) {
  if constexpr (std::is_same_v<Stored, f16>) {
    return to_f16(value);
  } else if constexpr (std::is_same_v<Stored, bf16>) {
    return to_bf16(value);
  } else {
    return value;
  }
}

// ---- Operations

// Integers wrap: they are combined as unsigned numbers, at least as wide as int, and cut to size.
template <class T>
struct WrappingType {
  using type = T;
};
template <class T>
  requires std::is_integral_v<T>
struct WrappingType<T> {
  using type = std::common_type_t<std::make_unsigned_t<T>, unsigned>;
};
template <class T>
using Wrapping = typename WrappingType<T>::type;

struct Sum {
  template <class T>
  [[gnu::always_inline]] RR_HOST_DEVICE static inline T of(T a, T b) {
    return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
  }
};

struct Prod {
  template <class T>
  [[gnu::always_inline]] RR_HOST_DEVICE static inline T of(T a, T b) {
    return static_cast<T>(static_cast<Wrapping<T>>(a) * static_cast<Wrapping<T>>(b));
  }
  // The minus belongs to a factor: the same bits as a difference of products, but that one gcc 12
  // turns into a fused multiply-add on some CPUs, in spite of -ffp-contract=off.
  template <class T>
  [[gnu::always_inline]] RR_HOST_DEVICE static inline Complex<T> of(Complex<T> a, Complex<T> b) {
    return {a.real * b.real + a.imaginary * -b.imaginary,
            a.real * b.imaginary + a.imaginary * b.real};
  }
};

// A NaN differs from itself. If b is one, no comparison with it holds, and it is the last choice.
struct Min {
  template <class T>
  [[gnu::always_inline]] RR_HOST_DEVICE static inline T of(T a, T b) {
    return a < b ? a : a != a ? a : b;
  }
};

struct Max {
  template <class T>
  [[gnu::always_inline]] RR_HOST_DEVICE static inline T of(T a, T b) {
    return a > b ? a : a != a ? a : b;
  }
};

// The sum and maximum, and the product and minimum, of truth values.
struct Or {
  [[gnu::always_inline]] RR_HOST_DEVICE static inline Bool of(Bool a, Bool b) {
    return Bool(uint8_t(a) | uint8_t(b));
  }
};

struct And {
  [[gnu::always_inline]] RR_HOST_DEVICE static inline Bool of(Bool a, Bool b) {
    return Bool(uint8_t(a) & uint8_t(b));
  }
};

// What happens to a combined value before it is written.
struct Keep {
  template <class T>
  [[gnu::always_inline]] RR_HOST_DEVICE inline T operator()(T value) const {
    return value;
  }
};

template <class T>
struct DivideBy {
  std::common_type_t<T, int> size;
  template <class Value>  // T, or a vector of T
  [[gnu::always_inline]] RR_HOST_DEVICE inline Value operator()(Value value) const {
    return static_cast<Value>(value / size);  // integers: toward zero
  }
};

}  // namespace ringreduce
