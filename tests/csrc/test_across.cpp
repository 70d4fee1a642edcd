// What runs between nodes, on virtual ranks: rings of several lanes. Prints what differs; exits
// with 1 if anything did.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "sim/simulate.h"

namespace ringreduce::sim {
namespace {

int num_failures = 0;

void check(bool condition, const std::string& what) {
  if (!condition && ++num_failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

/// Rank r has (r + 1) * (i % 7 - 3) at i: exact sums.
Outcome run(Algorithm algorithm, size_t count, int size, size_t chunk, size_t lanes,
            const Machine& machine, const std::string& name) {
  std::vector<int64_t> inputs(count * static_cast<size_t>(size)), outputs(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    inputs[i] = static_cast<int64_t>(i / count + 1) * (static_cast<int64_t>(i % count % 7) - 3);
  }
  const Problem problem{{Dtype::i64, Op::sum, size},
                        Blocks::even(count, size),
                        chunk,
                        reinterpret_cast<const char*>(inputs.data()),
                        reinterpret_cast<char*>(outputs.data()),
                        1,
                        lanes};
  Outcome outcome = simulate(algorithm, problem, machine);
  const int64_t ranks = static_cast<int64_t>(size) * (size + 1) / 2;
  bool right = true;
  for (size_t i = 0; i < outputs.size(); ++i) {
    right = right && outputs[i] == ranks * (static_cast<int64_t>(i % count % 7) - 3);
  }
  check(right || !outcome.failure.empty(), name + ": wrong");
  return outcome;
}

/// lanes + 1 slots are enough in any order of events and whatever the counts; lanes are not.
void test_lanes() {
  for (int size = 2; size <= 64; size = size < 9 ? size + 1 : size * 3 / 2) {
    const size_t ranks = static_cast<size_t>(size);
    for (const size_t lanes : {1, 2, 3, 5}) {
      for (const size_t count :
           {size_t{0}, size_t{1}, ranks - 1, ranks + 1, 7 * ranks + 3, 2 * lanes * 3 * ranks}) {
        const std::string name = "ring of " + std::to_string(size) + ", " + std::to_string(lanes) +
                                 " lanes, " + std::to_string(count) + " elements";
        Machine machine{.slots = lanes + 1};
        const Outcome outcome =
            run(Algorithm::ring_allreduce, count, size, 3, lanes, machine, name);
        check(outcome.failure.empty(), name + ": " + outcome.failure);
        machine.order = Order::random;
        machine.max_delay_s = 5;
        machine.seed = count + lanes;
        const Outcome random = run(Algorithm::ring_allreduce, count, size, 3, lanes, machine, name);
        check(random.failure.empty(), name + ", random: " + random.failure);
      }
      const Outcome stuck = run(Algorithm::ring_allreduce, 2 * lanes * 3 * ranks, size, 3, lanes,
                                {.slots = lanes}, "too few slots");
      check(stuck.failure.find("deadlock") == 0, "fewer than lanes + 1 slots should not be enough");
    }
  }
}

/// Adding takes as long as the link does. One lane leaves the links idle meanwhile; with two, and
/// three slots, they are busy all the time.
void test_lanes_hide_the_arithmetic() {
  const size_t chunk = 4, rounds = 8;
  for (const int size : {2, 3, 8, 33}) {
    const size_t count = rounds * chunk * static_cast<size_t>(size), chunk_bytes = chunk * 8;
    const double link_s = 1.0 + static_cast<double>(chunk_bytes) * 0.25, sum_s = link_s;
    const double sums = static_cast<double>(rounds) * (size - 1);
    for (const size_t lanes : {1, 2, 4}) {
      Machine machine{.link = {1, 0.25}, .slots = lanes + 1};
      machine.sum_s_per_byte = sum_s / static_cast<double>(chunk_bytes);
      const double actual =
          run(Algorithm::ring_allreduce, count, size, chunk, lanes, machine, "timed").finish_s;
      const double busy = 2 * sums * link_s;
      const std::string text = std::to_string(size) + " ranks, " + std::to_string(lanes) +
                               " lanes: " + std::to_string(actual) + " against " +
                               std::to_string(busy);
      check(actual == (lanes == 1 ? busy + sums * sum_s : busy), text);
    }
  }
}

}  // namespace
}  // namespace ringreduce::sim

int main() {
  ringreduce::sim::test_lanes();
  ringreduce::sim::test_lanes_hide_the_arithmetic();
  std::printf("across: %d failures\n", ringreduce::sim::num_failures);
  return ringreduce::sim::num_failures == 0 ? 0 : 1;
}
