// The 16-bit floats and their conversions from and to float32: exact one way, rounded once to
// nearest, ties to even, the other way. NaN stays NaN and denormals are kept, also in a thread that
// flushes denormals to zero. Written in integers and selects, so that a loop over them vectorises
// on every CPU; always inlined, so that a file built for a newer CPU leaves no copy that others
// could call. No arithmetic: 16-bit floats are always computed in float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/device.h"

namespace ringreduce {

struct f16 {  // 1 sign bit, 5 exponent bits (bias 15), 10 fraction bits
  uint16_t bits;
};

struct bf16 {  // 1 sign bit, 8 exponent bits (bias 127), 7 fraction bits
  uint16_t bits;
};

[[gnu::always_inline]] RR_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[gnu::always_inline]] RR_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// condition ? yes : no, as arithmetic: a compiler that must not speculate a floating addition would
// make a branch of ?:, and would not vectorise the loop.
[[gnu::always_inline]] RR_HOST_DEVICE inline uint32_t choose(bool condition, uint32_t yes,
                                                             uint32_t no) {
  const uint32_t mask = 0u - uint32_t{condition};
  return (yes & mask) | (no & ~mask);
}

[[gnu::always_inline]] RR_HOST_DEVICE inline float to_float(bf16 value) {
  return float_of(uint32_t{value.bits} << 16);
}

[[gnu::always_inline]] RR_HOST_DEVICE inline bf16 to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  // Adding just under half of the last kept bit, and one more if that bit is odd, rounds to nearest
  // even; the carry may run into the exponent, up to infinity, which is what rounding asks for.
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const uint32_t quiet_nan = bits | 0x00400000;
  return {static_cast<uint16_t>((value != value ? quiet_nan : rounded) >> 16)};
}

[[gnu::always_inline]] RR_HOST_DEVICE inline float to_float(f16 value) {
  constexpr uint32_t rebias = (127 - 15) << 23;
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;  // at float32's places
  const uint32_t normal = magnitude + rebias;
  // Infinity and NaN: all exponent bits set. A NaN becomes quiet, as in the CPU's instruction.
  const uint32_t special = magnitude | 0x7f800000 | (magnitude > 0x0f800000 ? 0x00400000 : 0);
  // A denormal is fraction * 2^-24. With an exponent in front it reads 2^-14 + fraction * 2^-24;
  // taking 2^-14 away again is exact.
  const uint32_t denormal = bits_of(float_of(normal + (1u << 23)) - 0x1p-14f);
  const uint32_t finite = choose(magnitude < 0x00800000, denormal, normal);
  return float_of(sign | choose(magnitude >= 0x0f800000, special, finite));
}

[[gnu::always_inline]] RR_HOST_DEVICE inline f16 to_f16(float value) {
  constexpr uint32_t rebias = (127 - 15) << 23;
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // As in to_bf16, with 13 bits to drop. From 65520 on, the carry makes it infinity (0x7c00).
  const uint32_t normal = (magnitude - rebias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 the result is a multiple of 2^-24, the last place of 0.5: the addition rounds.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = choose(magnitude < bits_of(0x1p-14f), denormal, normal);
  const uint32_t quiet_nan = 0x7e00 | ((magnitude >> 13) & 0x03ff);
  const uint32_t special = magnitude > 0x7f800000 ? quiet_nan : 0x7c00;
  return {static_cast<uint16_t>(sign | choose(magnitude >= bits_of(65536.0f), special, finite))};
}

}  // namespace ringreduce
