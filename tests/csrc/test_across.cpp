// What runs between nodes, on virtual ranks: rings of several lanes. Prints what differs; exits
// with 1 if anything did.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "algorithms/choice.h"
#include "comm/tuner.h"
#include "net/wire.h"
#include "sim/hierarchical.h"
#include "sim/simulate.h"

namespace ringreduce::sim {
namespace {

int num_failures = 0;

void check(bool condition, const std::string& what) {
  if (!condition && ++num_failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

/// Rank r has (r + 1) * (i % 7 - 3) at i: exact sums. An allgather's rank r gives block r.
Outcome run(Algorithm algorithm, size_t count, int size, size_t chunk, size_t lanes,
            const Machine& machine, const std::string& name) {
  const auto value = [](size_t i) { return static_cast<int64_t>(i % 7) - 3; };
  std::vector<int64_t> inputs(count * static_cast<size_t>(size)), outputs(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    inputs[i] = static_cast<int64_t>(i / count + 1) * value(i % count);
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
  for (int rank = 0; rank < size; ++rank) {
    for (int owner = 0; owner < size; ++owner) {
      if (algorithm == Algorithm::ring_reduce_scatter && owner != rank) continue;
      const int64_t factor = algorithm == Algorithm::ring_allgather ? owner + 1 : ranks;
      const Chunk block = problem.blocks[owner];
      for (size_t i = block.offset; i < block.end(); ++i) {
        right = right && outputs[static_cast<size_t>(rank) * count + i] == factor * value(i);
      }
    }
  }
  check(right || !outcome.failure.empty(), name + ": wrong");
  return outcome;
}

/// lanes + 1 slots are enough in any order of events and whatever the counts; lanes are not.
void test_lanes(Algorithm algorithm) {
  const std::string title = algorithm_names[static_cast<int>(algorithm)];
  for (int size = 2; size <= 64; size = size < 9 ? size + 1 : size * 3 / 2) {
    const size_t ranks = static_cast<size_t>(size);
    for (const size_t lanes : {1, 2, 3, 5}) {
      for (const size_t count :
           {size_t{0}, size_t{1}, ranks - 1, ranks + 1, 7 * ranks + 3, 2 * lanes * 3 * ranks}) {
        const std::string name = title + " of " + std::to_string(size) + ", " +
                                 std::to_string(lanes) + " lanes, " + std::to_string(count) +
                                 " elements";
        Machine machine{.slots = lanes + 1};
        const Outcome outcome = run(algorithm, count, size, 3, lanes, machine, name);
        check(outcome.failure.empty(), name + ": " + outcome.failure);
        machine.order = Order::random;
        machine.max_delay_s = 5;
        machine.seed = count + lanes;
        const Outcome random = run(algorithm, count, size, 3, lanes, machine, name);
        check(random.failure.empty(), name + ", random: " + random.failure);
      }
      if (algorithm != Algorithm::ring_allreduce) continue;  // only there a rank always sends
      const Outcome stuck =
          run(algorithm, 2 * lanes * 3 * ranks, size, 3, lanes, {.slots = lanes}, "too few slots");
      check(stuck.failure.find("deadlock") == 0, "fewer than lanes + 1 slots should not be enough");
    }
  }
}

/// Whatever the number of ranks, chunks follow each other through one slot.
void test_doubling_takes_one_slot() {
  for (int size = 2; size <= 64; ++size) {
    const Machine machine{
        .slots = 1, .order = Order::random, .max_delay_s = 3, .seed = static_cast<uint64_t>(size)};
    const std::string name = "doubling of " + std::to_string(size) + " with one slot";
    const Outcome outcome = run(Algorithm::doubling_allreduce, 29, size, 3, 1, machine, name);
    check(outcome.failure.empty(), name + ": " + outcome.failure);
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

// ---- Hierarchical

struct ClusterCase {
  std::vector<int> local_sizes;
  size_t count, segment, lead, chunk;
  Across across;

  int size() const { return std::accumulate(local_sizes.begin(), local_sizes.end(), 0); }
  int nodes() const { return static_cast<int>(local_sizes.size()); }
  Rails rails() const {
    return {*std::min_element(local_sizes.begin(), local_sizes.end()), count, segment};
  }
  std::string name() const {
    std::string text = std::string("hierarchical over ") + name_of(across);
    for (const int local_size : local_sizes) text += " " + std::to_string(local_size);
    return text + ": " + std::to_string(count) + " elements in segments of " +
           std::to_string(segment) + ", lead " + std::to_string(lead);
  }
};

template <class Type>
ClusterOutcome run(const ClusterCase& test, const Cluster& cluster, Dtype dtype, Op op,
                   const std::vector<Type>& inputs, std::vector<Type>& outputs) {
  outputs.assign(inputs.size(), Type());
  const ClusterProblem problem{{dtype, op, test.size()},
                               test.rails(),
                               test.lead,
                               test.across,
                               test.chunk,
                               1,
                               reinterpret_cast<const char*>(inputs.data()),
                               reinterpret_cast<char*>(outputs.data())};
  ClusterOutcome outcome = simulate(problem, cluster);
  check(outcome.failure.empty(), test.name() + ": " + outcome.failure);
  return outcome;
}

void check_bytes(const ClusterCase& test, const ClusterOutcome& outcome, Dtype dtype) {
  size_t rank = 0;
  for (int node = 0; node < test.nodes(); ++node) {
    const int local_size = test.local_sizes[static_cast<size_t>(node)];
    for (int local = 0; local < local_size; ++local, ++rank) {
      const HierarchicalCost cost = hierarchical_cost(test.rails(), local_size, test.nodes(), node,
                                                      local, test.across, test.chunk);
      check(outcome.inside[rank].bytes_received == cost.inside_moved.bytes(dtype),
            test.name() + ": bytes inside of rank " + std::to_string(rank));
      check(outcome.across[rank].bytes_sent == cost.across_moved.bytes(dtype),
            test.name() + ": bytes across of rank " + std::to_string(rank));
    }
  }
}

void run_and_check(const ClusterCase& test) {
  const size_t size = static_cast<size_t>(test.size());
  std::vector<int64_t> inputs(test.count * size), outputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    inputs[i] = static_cast<int64_t>(i / test.count + 1) * static_cast<int64_t>(i % test.count % 7);
  }
  Cluster cluster{test.local_sizes, {1, 0}, {}, false};
  const ClusterOutcome outcome = run(test, cluster, Dtype::i64, Op::sum, inputs, outputs);
  check_bytes(test, outcome, Dtype::i64);
  for (size_t i = 0; i < outputs.size(); ++i) {
    const auto sum = static_cast<int64_t>(size * (size + 1) / 2 * (i % test.count % 7));
    if (outputs[i] != sum) return check(false, test.name() + ": wrong at " + std::to_string(i));
  }
  std::vector<uint16_t> ones(test.count * size, 0x3f80), means;
  run(test, cluster, Dtype::bf16, Op::avg, ones, means);
  check(ones == means, test.name() + ": the average of ones");
}

void test_hierarchical() {
  const std::vector<std::vector<int>> clusters = {
      {1},       {4},          {1, 1},          {2, 2}, {1, 3},
      {5, 2, 3}, {4, 4, 4, 4}, {3, 1, 2, 5, 1}, {8, 8}, {2, 2, 2, 2, 2, 2, 2}};
  for (const std::vector<int>& local_sizes : clusters) {
    for (const Across across : {Across::ring, Across::tree, Across::doubling}) {
      for (const size_t count : {0, 1, 7, 97}) {
        for (const size_t lead : {0, 1, 2})
          run_and_check({local_sizes, count, 20, lead, 3, across});
        run_and_check({local_sizes, count, 1000, 1, 2, across});
      }
    }
  }
}

/// Any order of events, delays, and one port for a node's ranks: the same bits on all ranks.
void test_hierarchical_bits() {
  for (const std::vector<int>& local_sizes : {std::vector<int>{4, 2, 3}, {2, 2, 2, 2, 2}}) {
    for (const Across across : {Across::ring, Across::tree, Across::doubling}) {
      const ClusterCase test{local_sizes, 101, 30, 1, 4, across};
      std::vector<float> inputs(test.count * static_cast<size_t>(test.size())), first, outputs;
      Random random(5);
      for (float& input : inputs) input = static_cast<float>(random.unit() - 0.5);
      for (uint64_t seed = 0; seed < 6; ++seed) {
        Cluster cluster{local_sizes, {1, 0.01}, {.order = Order::random}, seed % 2 == 1};
        cluster.machine.max_delay_s = 9;
        cluster.machine.seed = seed;
        run(test, cluster, Dtype::f32, Op::sum, inputs, outputs);
        if (seed == 0) first.assign(outputs.begin(), outputs.begin() + 101);
        for (size_t i = 0; i < outputs.size(); ++i) {
          if (outputs[i] != first[i % test.count]) {
            check(false, test.name() + ": other bits, seed " + std::to_string(seed));
            break;
          }
        }
      }
    }
  }
}

/// Equal nodes and equal segments: exact where the network is the slower, and else within the
/// bound; a shared port makes a node's rails share its bandwidth.
void test_hierarchical_times() {
  for (const int nodes : {2, 3, 8, 16}) {
    for (const size_t segments : {1, 2, 5}) {
      for (const Link inside : {Link{0.5, 0.001}, Link{1, 0.5}, Link{20, 2}}) {
        for (const Across across : {Across::ring, Across::doubling}) {
          const size_t chunk = 2, shard = 2 * chunk * static_cast<size_t>(nodes);
          const ClusterCase test{std::vector<int>(static_cast<size_t>(nodes), 4),
                                 4 * shard * segments,
                                 4 * shard,
                                 1,
                                 chunk,
                                 across};
          Cluster cluster{test.local_sizes, inside, {}, false};
          cluster.machine.link = {1, 0.25};
          std::vector<int64_t> inputs(test.count * static_cast<size_t>(test.size())), outputs;
          const double actual = run(test, cluster, Dtype::i64, Op::sum, inputs, outputs).finish_s;
          const HierarchicalCost cost =
              hierarchical_cost(test.rails(), 4, nodes, 0, 0, across, chunk);
          const double across_s = cost.across.time_s(cluster.machine.link, Dtype::i64);
          const double inside_s = cost.reduce_scatter.time_s(inside, Dtype::i64) +
                                  cost.allgather.time_s(inside, Dtype::i64);
          const double expected = cost.time_s(inside, across_s, Dtype::i64);
          const bool exact =
              (nodes != 3 || across == Across::ring) && (inside_s <= across_s || segments == 1);
          check(exact ? std::abs(actual - expected) < 1e-9 * expected
                      : actual <= 1.000001 * expected && actual >= 0.7 * expected,
                test.name() + " by " + std::to_string(nodes) + ": takes " + std::to_string(actual) +
                    ", not " + std::to_string(expected));
          cluster.shared_port = true;
          const double shared = run(test, cluster, Dtype::i64, Op::sum, inputs, outputs).finish_s;
          check(exact ? shared > actual : shared >= actual,
                test.name() + ": a shared port costs nothing");
        }
      }
    }
  }
}

// ---- The choice

constexpr int local_ranks = 8;

/// tree_time_s against the simulator.
void test_tree_time() {
  for (const int size : {2, 3, 8, 37, 64}) {
    for (const double beta : {0.01, 0.05, 0.25, 1.0, 8.0}) {
      for (const size_t chunks : {1, 2, 8, 40}) {
        const Machine machine{.link = {1, beta / 8}};
        const double actual =
            run(Algorithm::tree_allreduce, 2 * chunks, size, 1, 1, machine, "tree").finish_s;
        const double predicted = tree_time_s(2 * chunks, size, 1, machine.link, Dtype::i64);
        check(predicted >= 0.92 * actual && predicted <= 1.35 * actual,
              "a tree of " + std::to_string(size) + ", beta " + std::to_string(beta) + ", " +
                  std::to_string(chunks) + " chunks: " + std::to_string(actual) + ", predicted " +
                  std::to_string(predicted));
      }
    }
  }
}

/// The best of all algorithms, in up to 64 segments, in chunks of up to 1 MB: hierarchical, and
/// over all ranks as if there were no nodes, and each had a node's network for itself.
double best_time_s(const Constants& constants, size_t count, int nodes) {
  const Link inside = constants.inside(), link = constants.rail(local_ranks);
  double best_s = 1e9;
  for (size_t chunk = 16; chunk <= (size_t{1} << 18); chunk *= 2) {
    for (const Across across : {Across::ring, Across::tree, Across::doubling}) {
      best_s = std::min(best_s, across_time_s({across, chunk}, count, nodes * local_ranks,
                                              constants.rail(1), Dtype::f32, NetWire::lanes));
      for (size_t segments = 1; segments <= 64; segments *= 2) {
        const Rails rails{local_ranks, count, (count + segments - 1) / segments};
        best_s = std::min(best_s, hierarchical_time_s(rails, local_ranks, nodes, {across, chunk},
                                                      inside, link, Dtype::f32, NetWire::lanes));
      }
    }
  }
  return best_s;
}

/// No allreduce takes less: each step at best doubles the nodes that are reached; and of the
/// message, each rank's part has to leave and to come back.
double lower_bound_s(const Constants& constants, double bytes, int nodes) {
  const Link inside = constants.inside(), link = constants.rail(local_ranks);
  const double latency_s = ceil_log2(nodes) * link.alpha_s + 2 * inside.alpha_s;
  const double across_s = 2.0 * (nodes - 1) / nodes * bytes / local_ranks * link.beta_s_per_byte;
  const double inside_s = 2.0 * (local_ranks - 1) / local_ranks * bytes * inside.beta_s_per_byte;
  return std::max({latency_s, across_s, inside_s});
}

/// What the tuner answers for 1 KB to 1 GB on 8 to 4096 nodes of 8 ranks: no algorithm is more than
/// 10 % faster; and at both ends it is near what the links allow.
void test_choice() {
  const double inside_gb_per_s = 100;
  const std::vector<Measured> networks = {
      {},  // the source's
      {{"network_us", 2}, {"network_rank_gb_per_s", 12}, {"network_node_gb_per_s", 96}},
      {{"network_us", 30}, {"network_rank_gb_per_s", 0.125}, {"network_node_gb_per_s", 1}},
      {{"network_us", 5}, {"network_rank_gb_per_s", 10}, {"network_node_gb_per_s", 25}}};
  for (Measured measured : networks) {
    if (!measured.empty()) measured["inside_gb_per_s"] = inside_gb_per_s;
    const Tuner tuner(ringreduce::Algorithm::automatic, false, measured);
    for (int nodes = 8; nodes <= 4096; nodes = nodes < 64 ? nodes + 7 : nodes * 2) {
      for (size_t bytes = 1024; bytes <= size_t{1} << 30; bytes *= 4) {
        const NodesChoice choice =
            tuner.across(bytes / 4, {nodes, local_ranks, local_ranks}, Dtype::f32);
        const std::string name = std::to_string(bytes) + " bytes on " + std::to_string(nodes) +
                                 " nodes, " + std::to_string(tuner.constants().network_us) +
                                 " us: ";
        const double times = choice.time_s / best_time_s(tuner.constants(), bytes / 4, nodes);
        check(times <= 1.1, name + std::to_string(times) + " x the best");
        const double bound_s = lower_bound_s(tuner.constants(), static_cast<double>(bytes), nodes);
        const bool at_an_end = bytes == 1024 || bytes == size_t{1} << 30;
        check(!at_an_end || choice.time_s <= 1.3 * bound_s,
              name + std::to_string(choice.time_s / bound_s) + " x the bound");
        check(choice.time_s >= bound_s, name + "less than the bound");
      }
    }
  }
}

/// A node with one rank leaves the others one rail, yet what they do inside takes as long.
void test_choice_of_unequal_nodes() {
  const Tuner tuner(ringreduce::Algorithm::automatic, false);
  const size_t count = size_t{4} << 20;
  const auto segment = [&](int local_size, int rails) {
    return tuner.across(count, {3, local_size, rails}, Dtype::f32).segment;
  };
  check(segment(1, 1) == count, "nodes of one rank have nothing to hide");
  check(segment(2, 2) < count && segment(8, 8) < count, "equal nodes: one segment");
  check(segment(8, 1) < count, "unequal nodes: one segment");
}

}  // namespace
}  // namespace ringreduce::sim

int main() {
  ringreduce::sim::test_lanes(ringreduce::sim::Algorithm::ring_allreduce);
  ringreduce::sim::test_lanes(ringreduce::sim::Algorithm::ring_reduce_scatter);
  ringreduce::sim::test_lanes(ringreduce::sim::Algorithm::ring_allgather);
  ringreduce::sim::test_lanes_hide_the_arithmetic();
  ringreduce::sim::test_doubling_takes_one_slot();
  ringreduce::sim::test_hierarchical();
  ringreduce::sim::test_hierarchical_bits();
  ringreduce::sim::test_hierarchical_times();
  ringreduce::sim::test_tree_time();
  ringreduce::sim::test_choice();
  ringreduce::sim::test_choice_of_unequal_nodes();
  std::printf("across: %d failures\n", ringreduce::sim::num_failures);
  return ringreduce::sim::num_failures == 0 ? 0 : 1;
}
