// The kernels, run by ranks that are streams of this process: results against reduce() on the CPU,
// bit by bit.
#include <unistd.h>

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

/// A NaN's bits may differ.
bool same(Dtype dtype, const std::vector<char>& a, const std::vector<char>& b) {
  if (a == b) return true;
  const bool is_complex = dtype == Dtype::c64 || dtype == Dtype::c128;
  const size_t part = size_of(dtype) / (is_complex ? 2 : 1);
  for (size_t at = 0; at < a.size(); at += part) {
    if (std::memcmp(&a[at], &b[at], part) == 0) continue;
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

void test_two_shot(KernelRanks& ranks, Dtype dtype, Op op, size_t count, Layout layout,
                   Random& random) {
  const std::string what = std::string("two_shot ") + name_of(dtype) + " " + name_of(op) + " " +
                           std::to_string(count) + " of " + std::to_string(ranks.size());
  const size_t bytes = count * size_of(dtype);
  std::vector<std::unique_ptr<Buffer>> inputs, outputs;
  std::vector<std::vector<char>> values;
  for (int rank = 0; rank < ranks.size(); ++rank) {
    const size_t skew =
        (layout.skew_elements + (layout.skews_differ ? random() % 3 : 0)) * size_of(dtype);
    values.push_back(random_bytes(dtype, count, random));
    inputs.push_back(std::make_unique<Buffer>(bytes, skew));
    if (!layout.in_place) outputs.push_back(std::make_unique<Buffer>(bytes, skew));
    inputs.back()->fill(values.back());
  }
  std::vector<DeviceCall> calls = ranks.calls(dtype, op, count);
  for (DeviceCall& call : calls) {
    for (size_t rank = 0; rank < inputs.size(); ++rank) {
      call.inputs[rank] = inputs[rank]->data();
      call.outputs[rank] = (layout.in_place ? inputs : outputs)[rank]->data();
    }
  }
  ranks.launch(Kernel::two_shot, calls);
  ranks.wait();
  ranks.require_no_trouble(what);
  const std::vector<char> right = expected(dtype, op, count, values);
  for (const auto& output : layout.in_place ? inputs : outputs) {
    require(same(dtype, output->read(), right), what + ": wrong");
    require(output->guards_intact(), what + ": wrote outside");
  }
}

void test_all() {
  Random random(1);
  for (int size : {1, 2, 3, 4, 8}) {
    KernelRanks ranks(size);
    for (int dtype = 0; dtype < num_dtypes; ++dtype) {
      for (int op = 0; op < num_ops; ++op) {
        if (!supports(static_cast<Op>(op), static_cast<Dtype>(dtype))) continue;
        for (size_t count : {0, 1, 3, 10007}) {
          const Layout layout{random() % 5, random() % 4 == 0, random() % 2 == 0};
          test_two_shot(ranks, static_cast<Dtype>(dtype), static_cast<Op>(op), count, layout,
                        random);
        }
      }
    }
  }
}

}  // namespace
}  // namespace ringreduce::cuda

int main() {
  alarm(300);
  ringreduce::cuda::test_all();
  std::printf("kernels: good\n");
  return 0;
}
