// The kernels, run by ranks that are streams of this process: results against reduce() on the CPU,
// bit by bit.
#include <unistd.h>

#include "base/half.h"
#include "kernel_ranks.h"

namespace ringreduce::cuda {
namespace {

using Random = std::mt19937_64;

bool is_nan(Dtype dtype, const char* element) {
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
bool are_zeros(Dtype dtype, const char* a, const char* b) {
  if (dtype != Dtype::c64 && dtype != Dtype::c128) return false;
  const size_t part = size_of(dtype) / 2;
  for (size_t i = 0; i + 1 < part; ++i) {
    if (a[i] != 0 || b[i] != 0) return false;
  }
  return ((a[part - 1] | b[part - 1]) & 0x7f) == 0;
}

/// A NaN's bits may differ.
bool same(Dtype dtype, const std::vector<char>& a, const std::vector<char>& b) {
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
std::vector<char> random_bytes(Dtype dtype, size_t count, Random& random) {
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
std::vector<char> small_integers(Dtype dtype, size_t count, Random& random) {
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

std::vector<char> expected(Dtype dtype, Op op, size_t count,
                           const std::vector<std::vector<char>>& inputs) {
  std::vector<char> result(count * size_of(dtype));
  std::vector<Source> sources;
  for (const auto& input : inputs) sources.push_back({input.data(), Format::storage});
  const Target target{result.data(), Format::storage};
  reduce({dtype, op, static_cast<int>(inputs.size())}, {&target, 1}, sources, count);
  return result;
}

struct Layout {
  size_t skew_elements = 0;
  bool skews_differ = false, in_place = false;
};

const char* name_of(Kernel kernel) {
  constexpr const char* names[] = {"one_shot", "two_shot", "staged", "ring", "tree"};
  return names[static_cast<int>(kernel)];
}

constexpr Kernel all_kernels[] = {Kernel::one_shot, Kernel::two_shot, Kernel::staged, Kernel::ring,
                                  Kernel::tree};

/// The tensors of one call of all ranks.
struct Tensors {
  std::vector<std::unique_ptr<Buffer>> inputs, outputs;  // outputs empty: in place

  Buffer& output(size_t rank) const { return *(outputs.empty() ? inputs : outputs)[rank]; }
  void give(std::vector<DeviceCall>& calls) const {
    for (size_t rank = 0; rank < calls.size(); ++rank) {
      calls[rank].input = inputs[rank]->data();
      calls[rank].output = output(rank).data();
      for (size_t peer = 0; peer < calls.size(); ++peer) {
        calls[rank].inputs[peer] = inputs[peer]->data();
        calls[rank].outputs[peer] = output(peer).data();
      }
    }
  }
};

/// ring and tree do not add in rank order: their results are compared for small integers, which
/// every order adds alike, and otherwise among each other.
bool in_rank_order(Kernel kernel) { return kernel != Kernel::ring && kernel != Kernel::tree; }

void test_allreduce(KernelRanks& ranks, Kernel kernel, Dtype dtype, Op op, size_t count,
                    Layout layout, Random& random) {
  const std::string what = std::string(name_of(kernel)) + " " + name_of(dtype) + " " + name_of(op) +
                           " " + std::to_string(count) + " of " + std::to_string(ranks.size());
  const size_t bytes = count * size_of(dtype);
  const bool exact = in_rank_order(kernel) || random() % 2 == 0;
  Tensors tensors;
  std::vector<std::vector<char>> values;
  for (int rank = 0; rank < ranks.size(); ++rank) {
    const size_t skew =
        (layout.skew_elements + (layout.skews_differ ? random() % 3 : 0)) * size_of(dtype);
    values.push_back(in_rank_order(kernel) || !exact ? random_bytes(dtype, count, random)
                                                     : small_integers(dtype, count, random));
    tensors.inputs.push_back(std::make_unique<Buffer>(bytes, skew));
    if (!layout.in_place) tensors.outputs.push_back(std::make_unique<Buffer>(bytes, skew));
    tensors.inputs.back()->fill(values.back());
  }
  std::vector<DeviceCall> calls = ranks.calls(dtype, op, count);
  tensors.give(calls);
  ranks.launch(kernel, calls);
  ranks.wait();
  ranks.require_no_trouble(what);
  const std::vector<char> right =
      exact ? expected(dtype, op, count, values) : tensors.output(0).read();
  for (size_t rank = 0; rank < calls.size(); ++rank) {
    require(same(dtype, tensors.output(rank).read(), right), what + ": wrong");
    require(tensors.output(rank).guards_intact(), what + ": wrote outside");
    if (!layout.in_place) {
      require(tensors.inputs[rank]->read() == values[rank], what + ": an input has changed");
    }
  }
}

void test_allreduces(Random& random) {
  for (int size : {1, 2, 3, 4, 8}) {
    KernelRanks ranks(size);
    for (Kernel kernel : all_kernels) {
      for (int number = 0; number < num_dtypes * num_ops; ++number) {
        const Dtype dtype = static_cast<Dtype>(number / num_ops);
        const Op op = static_cast<Op>(number % num_ops);
        if (!supports(op, dtype)) continue;
        for (size_t count : {0, 1, size - 1, size + 1, 1009}) {
          const Layout layout{random() % 5, random() % 4 == 0, random() % 2 == 0};
          test_allreduce(ranks, kernel, dtype, op, count, layout, random);
        }
      }
    }
  }
}

}  // namespace
}  // namespace ringreduce::cuda

int main() {
  alarm(300);
  ringreduce::cuda::Random random(1);
  ringreduce::cuda::test_allreduces(random);
  std::printf("kernels: good\n");
  return 0;
}
