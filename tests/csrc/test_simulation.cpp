// Runs every algorithm on virtual ranks, 1 to 64 of them: results exactly, the same bits on all
// ranks whatever the timing, no deadlock with two slots per FIFO, and steps, bytes and times
// against cost.h. Prints what differs; exits with 1 if anything did.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "algorithms/cost.h"
#include "algorithms/ring.h"
#include "algorithms/tree.h"
#include "base/half.h"
#include "sim/simulate.h"
#include "sim/wire.h"

namespace ringreduce::sim {
namespace {

int num_failures = 0;

void check(bool condition, const std::string& what) {
  if (!condition && ++num_failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

constexpr Algorithm all_algorithms[] = {
    Algorithm::ring_allreduce,   Algorithm::ring_reduce_scatter,
    Algorithm::ring_allgather,   Algorithm::tree_allreduce,
    Algorithm::one_shot,         Algorithm::two_shot,
    Algorithm::staged_allreduce, Algorithm::staged_reduce_scatter,
    Algorithm::staged_allgather, Algorithm::doubling_allreduce,
};
constexpr Algorithm allreduces[] = {
    Algorithm::ring_allreduce, Algorithm::tree_allreduce,   Algorithm::one_shot,
    Algorithm::two_shot,       Algorithm::staged_allreduce, Algorithm::doubling_allreduce,
};

bool is_one_of(Algorithm algorithm, std::initializer_list<Algorithm> algorithms) {
  return std::find(algorithms.begin(), algorithms.end(), algorithm) != algorithms.end();
}
bool on_wires(Algorithm algorithm) { return algorithm <= Algorithm::doubling_allreduce; }
bool is_staged(Algorithm algorithm) { return algorithm >= Algorithm::staged_allreduce; }
bool scatters(Algorithm algorithm) {
  return is_one_of(algorithm, {Algorithm::ring_reduce_scatter, Algorithm::staged_reduce_scatter});
}
bool gathers(Algorithm algorithm) {
  return is_one_of(algorithm, {Algorithm::ring_allgather, Algorithm::staged_allgather});
}

/// The elements of one kind of test: what goes in, and what must come out.
struct Int64 {
  using Type = int64_t;
  static constexpr Dtype dtype = Dtype::i64;
  static constexpr Op op = Op::sum;
  static Type input(int rank, size_t index) {
    return static_cast<Type>((index * 7 + static_cast<size_t>(rank) * 13) % 1009) - 500;
  }
  static Type reduced(int size, size_t index) {
    Type sum = 0;
    for (int rank = 0; rank < size; ++rank) sum += input(rank, index);
    return sum;
  }
};

/// The average is not exact, but the sum before the one division is.
struct Average {
  using Type = float;
  static constexpr Dtype dtype = Dtype::f32;
  static constexpr Op op = Op::avg;
  static Type input(int rank, size_t index) {
    return static_cast<Type>(Int64::input(rank, index)) / 8;
  }
  static Type reduced(int size, size_t index) {
    return static_cast<Type>(Int64::reduced(size, index)) / 8 / static_cast<Type>(size);
  }
};

/// One rank gives 256, the others 1. A bfloat16 in between would lose every 1; float32 loses none.
struct Bfloat16 {
  struct Type {
    uint16_t bits;
    bool operator==(const Type&) const = default;
  };
  static constexpr Dtype dtype = Dtype::bf16;
  static constexpr Op op = Op::sum;
  static Type of(int value) { return {to_bf16(static_cast<float>(value)).bits}; }
  static Type input(int rank, size_t index) {
    return of(rank == static_cast<int>(index % 3) ? 256 : 1);
  }
  static Type reduced(int size, size_t index) {
    return of(static_cast<int>(index % 3) < size ? 255 + size : size);
  }
};

/// Random bits of ordinary numbers: any other order of addition gives other sums.
struct RandomFloat {
  using Type = float;
  static constexpr Dtype dtype = Dtype::f32;
  static constexpr Op op = Op::sum;
  static Type input(int rank, size_t index) {
    Random random(static_cast<uint64_t>(rank) << 32 | index);
    return static_cast<float>((random.unit() - 0.5) *
                              std::exp2(static_cast<double>(random.below(20))));
  }
};

/// A case: the call, and the machine that it runs on.
struct Case {
  Algorithm algorithm;
  Blocks blocks;
  size_t chunk;
  Machine machine = {};
  bool in_place = false;
  size_t lead = 1;

  int size() const { return blocks.size(); }
  std::string name() const {
    return std::string(algorithm_names[static_cast<int>(algorithm)]) + " of " +
           std::to_string(blocks.count()) + " elements by " + std::to_string(size()) +
           " in chunks of " + std::to_string(chunk) + (machine.claims ? ", claimed" : "") +
           (in_place ? ", in place" : "") + ", seed " + std::to_string(machine.seed);
  }
};

template <class Element>
using Tensors = std::vector<typename Element::Type>;  // of all ranks, one after the other

template <class Element>
Outcome run(const Case& test, Tensors<Element>& outputs) {
  const size_t count = test.blocks.count();
  Tensors<Element> inputs(count * static_cast<size_t>(test.size()));
  for (size_t i = 0; i < inputs.size(); ++i) {
    inputs[i] = Element::input(static_cast<int>(i / count), i % count);
  }
  outputs = test.in_place ? inputs : Tensors<Element>(inputs.size());
  const auto* input_bytes = reinterpret_cast<const char*>(inputs.data());
  auto* output_bytes = reinterpret_cast<char*>(outputs.data());
  const Problem problem{{Element::dtype, Element::op, test.size()}, test.blocks,  test.chunk,
                        test.in_place ? output_bytes : input_bytes, output_bytes, test.lead};
  Outcome outcome = simulate(test.algorithm, problem, test.machine);
  check(outcome.failure.empty(), test.name() + ": " + outcome.failure);
  return outcome;
}

template <class Element>
void check_results(const Case& test, const Tensors<Element>& outputs) {
  const size_t count = test.blocks.count();
  for (int rank = 0; rank < test.size(); ++rank) {
    for (int owner = 0; owner < test.size(); ++owner) {
      if (scatters(test.algorithm) && owner != rank) continue;
      const Chunk block = test.blocks[owner];
      for (size_t i = block.offset; i < block.end(); ++i) {
        const auto expected =
            gathers(test.algorithm) ? Element::input(owner, i) : Element::reduced(test.size(), i);
        if (outputs[static_cast<size_t>(rank) * count + i] == expected) continue;
        check(false, test.name() + ": element " + std::to_string(i) + " of rank " +
                         std::to_string(rank) + " is wrong");
        return;
      }
    }
  }
}

/// Not of staged rounds.
Cost cost_of(const Case& test, int rank) {
  const Problem problem{{}, test.blocks, test.chunk, nullptr, nullptr};
  return *sim::cost_of(test.algorithm, problem, rank);
}

/// Where the formulas for the ring are exact: no block runs out of chunks before the last round.
bool blocks_last(const Case& test) {
  for (int rank = 0; rank < test.size(); ++rank) {
    if (test.blocks[rank].length <= (test.blocks.rounds(test.chunk) - 1) * test.chunk) return false;
  }
  return true;
}

/// What every rank moves is exactly what cost.h says; where slices are claimed, the sum over all
/// ranks is.
void check_bytes(const Case& test, const Outcome& outcome, Dtype dtype) {
  size_t sent = 0, received = 0, moved = 0;
  for (int rank = 0; rank < test.size(); ++rank) {
    const Counts& counts = outcome.ranks[static_cast<size_t>(rank)];
    const size_t expected = cost_of(test, rank).moved.bytes(dtype);
    const size_t actual =
        on_wires(test.algorithm) ? counts.bytes_sent : counts.bytes_sent + counts.bytes_received;
    if (!test.machine.claims) {
      check(actual == expected, test.name() + ": rank " + std::to_string(rank) + " moves " +
                                    std::to_string(actual) + " bytes, not " +
                                    std::to_string(expected));
    }
    sent += counts.bytes_sent;
    received += counts.bytes_received;
    moved += expected;
  }
  check(on_wires(test.algorithm) ? sent == received : sent + received == moved,
        test.name() + ": bytes went astray");
}

/// With alpha = 1 and beta = 0 the time is the number of steps.
void check_steps(const Case& test, const Outcome& outcome) {
  const auto steps = static_cast<double>(cost_of(test, 0).steps);
  const bool exact =
      !is_one_of(test.algorithm, {Algorithm::ring_allreduce, Algorithm::ring_reduce_scatter,
                                  Algorithm::ring_allgather}) ||
      test.size() == 1 || blocks_last(test);
  check(exact ? outcome.finish_s == steps : outcome.finish_s <= steps,
        test.name() + ": " + std::to_string(outcome.finish_s) + " steps, not " +
            std::to_string(steps));
}

template <class Element>
void run_and_check(const Case& test) {
  Tensors<Element> outputs;
  const Outcome outcome = run<Element>(test, outputs);
  check_results<Element>(test, outputs);
  if (is_staged(test.algorithm)) return;
  check_bytes(test, outcome, Element::dtype);
  check_steps(test, outcome);
}

/// Around the number of ranks, around the chunk, and primes.
std::set<size_t> odd_counts(int size, size_t chunk) {
  const size_t ranks = static_cast<size_t>(size);
  return {0, 1, ranks - 1, ranks, ranks + 1, chunk - 1, chunk, chunk + 1, 97, 251};
}

void test_results_and_costs() {
  for (int size = 1; size <= 64; ++size) {
    const size_t chunk = 4 + static_cast<size_t>(size) % 5;
    for (const size_t count : odd_counts(size, chunk)) {
      for (const Algorithm algorithm : all_algorithms) {
        Case test{algorithm, Blocks::even(count, size), chunk};
        run_and_check<Int64>(test);
        if (size <= 8 && !gathers(algorithm)) run_and_check<Average>(test);
        test.in_place = true;
        test.machine.order = Order::random;
        test.machine.claims = !on_wires(algorithm);
        run_and_check<Bfloat16>(test);
      }
    }
  }
}

/// Blocks of any lengths, as allgather and reduce_scatter have them; and all in one block: chains.
void test_uneven_blocks() {
  for (int size = 2; size <= 64; size += 3) {
    std::vector<size_t> offsets{0};
    for (int rank = 0; rank < size; ++rank)
      offsets.push_back(offsets.back() + static_cast<size_t>(rank * 5 % 7));
    for (const Algorithm algorithm : all_algorithms) {
      run_and_check<Int64>({algorithm, Blocks::table(offsets.data(), size), 2});
    }
    for (const size_t count : {0, 1, 7, 8, 9, 61}) {
      const int root = size / 2;
      const Blocks blocks = Blocks::single(count, size, root);
      for (const Algorithm algorithm :
           {Algorithm::ring_reduce_scatter, Algorithm::ring_allgather}) {
        Case test{algorithm, blocks, 8};
        test.machine.link = {1, 0.25};
        Tensors<Int64> outputs;
        const Outcome outcome = run<Int64>(test, outputs);
        check_results<Int64>(test, outputs);
        for (int rank = 0; rank < size; ++rank) {
          const Cost cost = algorithm == Algorithm::ring_allgather
                                ? chain_broadcast_cost(count, size, 8, root, rank)
                                : chain_reduce_cost(count, size, 8, root, rank);
          check(outcome.ranks[static_cast<size_t>(rank)].bytes_sent == cost.moved.bytes(Dtype::i64),
                test.name() + ": bytes of a chain");
          check(outcome.finish_s == cost.time_s(test.machine.link, Dtype::i64),
                test.name() + ": time of a chain");
        }
      }
    }
  }
}

/// Under alpha and beta: exact for equal blocks; trees, and doubling with extra ranks, stay below
/// their bounds, and near them.
void test_times() {
  for (const int size : {2, 3, 4, 5, 6, 7, 8, 13, 16, 31, 32, 33, 64}) {
    for (const Link link : {Link{1, 0.25}, Link{0, 1}, Link{64, 0.25}}) {
      for (const size_t rounds : {1, 2, 9}) {
        const size_t chunk = 4, count = rounds * chunk * static_cast<size_t>(size);
        for (const Algorithm algorithm : all_algorithms) {
          if (is_staged(algorithm)) continue;
          Case test{algorithm, Blocks::even(count, size), chunk};
          test.machine.link = link;
          Tensors<Int64> outputs;
          const double actual = run<Int64>(test, outputs).finish_s;
          const double expected = cost_of(test, 0).time_s(link, Int64::dtype);
          const bool is_bound = algorithm == Algorithm::tree_allreduce ||
                                (algorithm == Algorithm::doubling_allreduce &&
                                 !std::has_single_bit(static_cast<unsigned>(size)));
          check(is_bound ? actual <= expected && actual >= expected / 2 : actual == expected,
                test.name() + ": takes " + std::to_string(actual) + ", not " +
                    std::to_string(expected));
        }
      }
    }
  }
}

/// The same bits on all ranks, in every order of events, with every number of slots; and the same
/// times in every order, as no schedule looks at what happened to come first.
void test_timing_changes_nothing() {
  for (const int size : {2, 3, 5, 8, 13, 32, 64}) {
    for (const Algorithm algorithm : allreduces) {
      const size_t count = 211;
      Tensors<RandomFloat> first;
      for (uint64_t seed = 0; seed < 8; ++seed) {
        Case test{algorithm, Blocks::even(count, size), 10};
        test.machine = {{1, 0.01}, 2 + seed % 3, seed % 2 == 1, Order::random, 5.0, seed};
        Tensors<RandomFloat> outputs;
        const Outcome outcome = run<RandomFloat>(test, outputs);
        if (first.empty()) first.assign(outputs.begin(), outputs.begin() + count);
        for (int rank = 0; rank < size; ++rank) {
          check(std::memcmp(&outputs[static_cast<size_t>(rank) * count], first.data(),
                            count * sizeof(float)) == 0,
                test.name() + ": other bits on rank " + std::to_string(rank));
        }
        if (!on_wires(algorithm)) continue;
        test.machine.order = Order::by_time;
        check(run<RandomFloat>(test, outputs).finish_s == outcome.finish_s,
              test.name() + ": another time");
      }
    }
  }
}

// ---- The trees

void test_tree_places() {
  for (int size = 1; size <= 300; ++size) {
    const DoubleTree trees{size};
    check(trees.height() == static_cast<int>(std::bit_width(static_cast<unsigned>(size - 1))),
          "height");
    int inner_in_both = 0, deepest = 0;
    for (int rank = 0; rank < size; ++rank) {
      const TreePlace places[] = {trees.place(0, rank), trees.place(1, rank)};
      inner_in_both += places[0].num_children > 0 && places[1].num_children > 0;
      for (int tree = 0; tree < 2; ++tree) {
        const TreePlace& place = places[tree];
        deepest = std::max(deepest, place.depth);
        check((place.parent == -1) == (place.depth == 0), "the root is alone at depth 0");
        if (place.parent == -1) continue;
        const TreePlace parent = trees.place(tree, place.parent);
        check(std::count(parent.children, parent.children + parent.num_children, rank) == 1,
              "a parent knows its child");
        check(parent.depth + 1 == place.depth, "a child is one deeper");
      }
    }
    check(deepest == trees.height(), "the deepest is at the height");
    if (size > 2)
      check(inner_in_both == size % 2, "inner in both trees, of " + std::to_string(size));
  }
}

struct WireRun {
  std::string failure;
  double finish_s;
};

/// Runs body(rank, wire) on every rank. What it reduces are zeros.
template <class Body>
WireRun run_on_wires(int size, size_t count, size_t slots, Body body) {
  Machine machine;
  machine.slots = slots;
  Fibers fibers(size, machine.order, 0);
  Network network(fibers, machine, size);
  std::vector<int64_t> memory(count);
  const Runs runs{{0, count, reinterpret_cast<char*>(memory.data())}};
  const Message message{{Dtype::i64, Op::max, size}, sizeof(int64_t), runs, runs};
  std::vector<Counts> counts(static_cast<size_t>(size));
  fibers.run([&](int rank) {
    Wire wire(network, rank, message, counts[static_cast<size_t>(rank)]);
    body(rank, wire);
  });
  double finish_s = 0;
  for (const Counts& each : counts) finish_s = std::max(finish_s, each.finish_s);
  return {fibers.failure(), finish_s};
}

/// What tree_allreduce would be without its skew: each chunk goes up and down before the next one.
WireRun run_plain_tree(int size, size_t count, size_t chunk) {
  return run_on_wires(size, count, 2, [&](int rank, Wire& wire) {
    const TreePart parts[] = {TreePart::of(0, rank, size, count),
                              TreePart::of(1, rank, size, count)};
    for (size_t i = 0; i < (count / 2 + chunk - 1) / chunk; ++i) {
      for (const TreePart& part : parts) tree_up(wire, part, part.half.piece(i, chunk));
      for (const TreePart& part : parts) tree_down(wire, part, part.half.piece(i, chunk));
    }
  });
}

void test_tree_pipelines() {
  const size_t chunk = 2, chunks = 64, count = 2 * chunks * chunk;
  Tensors<Int64> outputs;
  const double skewed =
      run<Int64>({Algorithm::tree_allreduce, Blocks::even(count, 64), chunk}, outputs).finish_s;
  check(skewed == 2 * 6 + 64 - 1, "64 ranks, 64 chunks: " + std::to_string(skewed) + " steps");
  const WireRun plain = run_plain_tree(64, count, chunk);
  check(plain.failure.empty() && plain.finish_s >= 2 * 6 * 64,
        "without the skew no two chunks are under way, so it takes 2 H C steps or more");
}

// ---- What the simulation itself finds

void check_contains(const std::string& text, const std::string& part) {
  check(text.find(part) != std::string::npos, "\"" + text + "\" should say \"" + part + "\"");
}

void test_deadlocks_and_wrong_schedules_are_found() {
  const Chunk one{0, 1}, two{0, 2};
  // Everybody waits for the one before.
  WireRun run = run_on_wires(3, 2, 2, [&](int rank, Wire& wire) {
    const Ring ring{rank, 3};
    wire.recv_copy_send(ring.previous(), ring.next(), one);
  });
  check_contains(run.failure, "deadlock");
  check_contains(run.failure, "rank 1 waits for a message from rank 0");
  // Nobody empties the slots.
  run = run_on_wires(2, 2, 2, [&](int rank, Wire& wire) {
    for (int i = 0; i < 3; ++i) wire.send(Ring{rank, 2}.next(), one);
  });
  check_contains(run.failure, "rank 0 waits for a free slot to rank 1");
  // One rank leaves the collective early.
  run = run_on_wires(4, 64, 2, [&](int rank, Wire& wire) {
    if (rank != 2) tree_allreduce(wire, rank, 4, 64, 2);
  });
  check_contains(run.failure, "rank 2 has finished");
  // Two slots are enough for ring and tree, and one is not.
  run = run_on_wires(4, 64, 1, [&](int rank, Wire& wire) {
    ring_allgather(wire, Ring{rank, 4}, Blocks::even(64, 4), 2);
  });
  check_contains(run.failure, "deadlock");
  run = run_on_wires(4, 64, 1, [&](int rank, Wire& wire) { tree_allreduce(wire, rank, 4, 64, 2); });
  check_contains(run.failure, "deadlock");
  // Ranks disagree on the chunk, and on what a message is.
  run = run_on_wires(2, 2, 2, [&](int rank, Wire& wire) {
    wire.send(Ring{rank, 2}.next(), rank == 0 ? one : two);
    wire.recv_reduce_copy_send(Ring{rank, 2}.previous(), {}, one);
  });
  check_contains(run.failure, "expects [0, 1) of partial sums");
  run = run_on_wires(2, 2, 2, [&](int rank, Wire& wire) {
    wire.send(Ring{rank, 2}.next(), one);
    wire.recv_copy_send(Ring{rank, 2}.previous(), {}, one);
  });
  check_contains(run.failure, "expects [0, 1) of results");
}

/// Collectives follow each other on the same wires, and ranks do not meet in between.
void test_collectives_in_a_row() {
  for (int size = 2; size <= 33; ++size) {
    const size_t count = 61;
    const Blocks blocks = Blocks::even(count, size);
    const WireRun run = run_on_wires(size, count, 2, [&](int rank, Wire& wire) {
      const Ring ring{rank, size};
      for (const size_t chunk : {1, 5}) {
        tree_allreduce(wire, rank, size, count, chunk);
        ring_allreduce(wire, ring, blocks, chunk);
        ring_allgather(wire, ring, Blocks::single(count, size, size / 2), chunk);
        ring_reduce_scatter(wire, ring, blocks, chunk);
      }
    });
    check(run.failure.empty(),
          "collectives in a row, by " + std::to_string(size) + ": " + run.failure);
  }
}

void test_all() {
  test_tree_places();
  test_tree_pipelines();
  test_results_and_costs();
  test_uneven_blocks();
  test_times();
  test_timing_changes_nothing();
  test_deadlocks_and_wrong_schedules_are_found();
  test_collectives_in_a_row();
}

}  // namespace
}  // namespace ringreduce::sim

int main() {
  ringreduce::sim::test_all();
  std::printf("simulation: %d failures\n", ringreduce::sim::num_failures);
  return ringreduce::sim::num_failures == 0 ? 0 : 1;
}
