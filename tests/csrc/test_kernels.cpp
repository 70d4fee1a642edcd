// The kernels, run by ranks that are streams of this process: results against reduce() on the CPU,
// bit by bit.
#include <unistd.h>

#include <algorithm>

#include "kernel_ranks.h"
#include "kernel_values.h"

namespace ringreduce::cuda {
namespace {

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

// ---- Divisions

/// What of the message belongs to whom: random cuts, some of them of nothing; or all to one.
void divide(std::vector<DeviceCall>& calls, bool single, Random& random) {
  const size_t count = calls[0].count, size = calls.size();
  std::vector<size_t> cuts = {0, count};
  while (cuts.size() < size + 1) cuts.push_back(random() % 3 == 0 ? 0 : random() % (count + 1));
  std::sort(cuts.begin(), cuts.end());
  const int owner = static_cast<int>(random() % size);
  for (DeviceCall& call : calls) {
    call.division = single ? Division::single : Division::table;
    call.owner = owner;
    std::copy(cuts.begin(), cuts.end(), call.offsets);
  }
}

Chunk part_of(const DeviceCall& call, size_t rank) {
  if (call.division == Division::table) {
    return {call.offsets[rank], call.offsets[rank + 1] - call.offsets[rank]};
  }
  return {0, static_cast<int>(rank) == call.owner ? call.count : 0};
}

/// reduce_scatter, and reduce.
void test_reduce_scatter(KernelRanks& ranks, Dtype dtype, Op op, size_t count, bool single,
                         Random& random) {
  const std::string what = std::string("reduce_scatter ") + name_of(dtype) + " " + name_of(op) +
                           " " + std::to_string(count) + " of " + std::to_string(ranks.size());
  std::vector<DeviceCall> calls = ranks.calls(dtype, op, count);
  divide(calls, single, random);
  const size_t item = size_of(dtype);
  std::vector<std::unique_ptr<Buffer>> inputs, outputs;
  std::vector<std::vector<char>> values;
  for (size_t rank = 0; rank < calls.size(); ++rank) {
    values.push_back(random_bytes(dtype, count, random));
    inputs.push_back(std::make_unique<Buffer>(count * item, random() % 5 * item));
    outputs.push_back(
        std::make_unique<Buffer>(part_of(calls[rank], rank).length * item, random() % 5 * item));
    inputs.back()->fill(values.back());
    calls[rank].input = inputs.back()->data();
    calls[rank].output = outputs.back()->data();
    calls[rank].gathers = false;
  }
  ranks.launch(Kernel::staged, calls);
  ranks.wait();
  ranks.require_no_trouble(what);
  const std::vector<char> right = expected(dtype, op, count, values);
  for (size_t rank = 0; rank < calls.size(); ++rank) {
    const Chunk part = part_of(calls[rank], rank);
    const std::vector<char> mine(right.begin() + static_cast<ptrdiff_t>(part.offset * item),
                                 right.begin() + static_cast<ptrdiff_t>(part.end() * item));
    require(same(dtype, outputs[rank]->read(), mine), what + ": wrong");
    require(outputs[rank]->guards_intact(), what + ": wrote outside");
  }
}

/// allgather, and broadcast.
void test_allgather(KernelRanks& ranks, Dtype dtype, size_t count, bool single, Random& random) {
  const std::string what = std::string("allgather ") + name_of(dtype) + " " +
                           std::to_string(count) + " of " + std::to_string(ranks.size());
  std::vector<DeviceCall> calls = ranks.calls(dtype, Op::sum, count);
  divide(calls, single, random);
  const size_t item = size_of(dtype);
  const std::vector<char> right = random_bytes(dtype, count, random);
  std::vector<std::unique_ptr<Buffer>> inputs, outputs;
  for (size_t rank = 0; rank < calls.size(); ++rank) {
    const Chunk part = part_of(calls[rank], rank);
    const std::vector<char> mine(right.begin() + static_cast<ptrdiff_t>(part.offset * item),
                                 right.begin() + static_cast<ptrdiff_t>(part.end() * item));
    inputs.push_back(std::make_unique<Buffer>(mine.size(), random() % 5 * item));
    outputs.push_back(std::make_unique<Buffer>(right.size(), random() % 5 * item));
    inputs.back()->fill(mine);
    calls[rank].input = inputs.back()->data();
    calls[rank].output = outputs.back()->data();
    if (random() % 2 == 0) {  // in place
      char* const place = calls[rank].output + part.offset * item;
      check(cudaMemcpy(place, calls[rank].input, mine.size(), cudaMemcpyDefault));
      calls[rank].input = place;
    }
    calls[rank].reduces = false;
  }
  ranks.launch(Kernel::staged, calls);
  ranks.wait();
  ranks.require_no_trouble(what);
  for (size_t rank = 0; rank < calls.size(); ++rank) {
    require(outputs[rank]->read() == right, what + ": wrong");
    require(outputs[rank]->guards_intact(), what + ": wrote outside");
  }
}

void test_divisions(Random& random) {
  for (int size : {1, 2, 3, 4, 8}) {
    KernelRanks ranks(size, false);
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::u8, Dtype::c64, Dtype::c128}) {
      for (size_t count : {0, 1, size - 1, size + 1, 1009, 20011}) {
        for (bool single : {false, true}) {
          const Op op = random() % 2 == 0 ? Op::sum : Op::prod;
          test_reduce_scatter(ranks, dtype, op, count, single, random);
          test_allgather(ranks, dtype, count, single, random);
        }
      }
    }
  }
}

/// Rounds and slots of all kinds are used several times over.
void test_large(Random& random) {
  KernelRanks ranks(3);
  const size_t more_than_slots = (size_t{26} << 20) / sizeof(double);
  const Layout aligned{}, in_place{0, false, true};
  test_allreduce(ranks, Kernel::staged, Dtype::f64, Op::avg, more_than_slots, aligned, random);
  test_reduce_scatter(ranks, Dtype::f64, Op::max, more_than_slots / 2, false, random);
  test_allgather(ranks, Dtype::c128, more_than_slots / 2, true, random);
  test_allreduce(ranks, Kernel::ring, Dtype::f64, Op::sum, 700001, in_place, random);
  test_allreduce(ranks, Kernel::ring, Dtype::bf16, Op::avg, 700001, aligned, random);
  test_allreduce(ranks, Kernel::tree, Dtype::f64, Op::sum, 700001, in_place, random);
  test_allreduce(ranks, Kernel::tree, Dtype::f16, Op::sum, 700001, aligned, random);
  test_allreduce(ranks, Kernel::two_shot, Dtype::f32, Op::sum, 700001, in_place, random);
  test_allreduce(ranks, Kernel::one_shot, Dtype::i16, Op::sum, one_shot_largest_bytes / 2, in_place,
                 random);
}

}  // namespace
}  // namespace ringreduce::cuda

int main() {
  alarm(300);
  ringreduce::cuda::Random random(1);
  ringreduce::cuda::test_allreduces(random);
  ringreduce::cuda::test_divisions(random);
  ringreduce::cuda::test_large(random);
  std::printf("kernels: good\n");
  return 0;
}
