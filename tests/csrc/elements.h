// What the tests reduce: small integers as elements of several dtypes, so that sums are exact; the
// calls that reduce them and what must come out.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "base/half.h"
#include "comm/call.h"
#include "ranks.h"

namespace ringreduce {

template <class T>
struct Element;
template <>
struct Element<float> {
  static constexpr Dtype dtype = Dtype::f32;
  static float make(int value) { return static_cast<float>(value); }
};
template <>
struct Element<int64_t> {
  static constexpr Dtype dtype = Dtype::i64;
  static int64_t make(int value) { return value; }
};
template <>
struct Element<bf16> {
  static constexpr Dtype dtype = Dtype::bf16;
  static bf16 make(int value) { return to_bf16(static_cast<float>(value)); }
};

inline int value_of(int rank, size_t index, int salt) {
  return static_cast<int>((index * 7 + static_cast<size_t>(rank * 13 + salt)) % 11) - 5;
}

template <class T>
std::vector<T> input_of(int rank, size_t count, int salt, size_t from = 0) {
  std::vector<T> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = Element<T>::make(value_of(rank, from + i, salt));
  return values;
}

template <class T>
std::vector<T> reduced(Op op, int size, size_t count, int salt, size_t from = 0) {
  std::vector<T> values(count);
  for (size_t i = 0; i < count; ++i) {
    int result = value_of(0, from + i, salt);
    for (int rank = 1; rank < size; ++rank) {
      const int value = value_of(rank, from + i, salt);
      result = op == Op::max ? std::max(result, value) : result + value;
    }
    values[i] = Element<T>::make(result);
  }
  return values;
}

template <class T>
void require_equal(const T* actual, const std::vector<T>& expected, const std::string& what) {
  if (expected.empty() || std::memcmp(actual, expected.data(), expected.size() * sizeof(T)) == 0) {
    return;
  }
  size_t index = 0;
  while (std::memcmp(actual + index, &expected[index], sizeof(T)) == 0) ++index;
  fail(what + ": element " + std::to_string(index) + " of " + std::to_string(expected.size()) +
       " is wrong");
}

template <class T>
Tensor tensor_of(const T* input, T* output, std::vector<int64_t> shape) {
  Tensor tensor;
  tensor.input = reinterpret_cast<const char*>(input);
  tensor.output = reinterpret_cast<char*>(output);
  tensor.input_layout = {std::move(shape), {}, sizeof(T)};
  tensor.output_layout = tensor.input_layout;
  return tensor;
}

template <class T>
Call call_of(Kind kind, const T* input, T* output, std::vector<int64_t> shape, Op op = Op::sum,
             int root = 0) {
  return {kind, op, Element<T>::dtype, root, {tensor_of(input, output, std::move(shape))}, 0};
}

inline int64_t length(size_t count) { return static_cast<int64_t>(count); }

}  // namespace ringreduce
