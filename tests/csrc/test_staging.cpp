// How much memory ranks need so that nobody overwrites what others still have to read: for
// one_shot's inputs, and for the slots of staged rounds. Small cases in every possible order of
// events, larger ones in many random orders, with real data. Exits with 1 if something is unsafe,
// or if less than what is said to be necessary would do.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "algorithms/one_shot.h"
#include "algorithms/two_shot.h"
#include "sim/staged.h"
#include "sim/window.h"

namespace ringreduce::sim {
namespace {

using Phases = Staged::Phases;

constexpr Phases all_phases[] = {Phases::reduce_scatter, Phases::allgather, Phases::allreduce};
constexpr const char* names[] = {"reduce_scatter", "allgather", "allreduce"};

int num_failures = 0;

void check(bool condition, const std::string& what) {
  if (!condition && ++num_failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// ---- Every order of events

/// The steps of one rank, as staged_rounds makes them.
struct Trace {
  enum Kind { prepares, combines, collects };
  struct Step {
    Kind kind;
    size_t round;
  };
  std::vector<Step> steps;

  void prepare(size_t round) { steps.push_back({prepares, round}); }
  void combine(size_t round) { steps.push_back({combines, round}); }
  void collect(size_t round) { steps.push_back({collects, round}); }
};

/// Walks through all states that `size` ranks can be in together. A state is how many steps each
/// has finished; the step after these may be under way. Without data, and without time.
class Explorer {
 public:
  Explorer(Phases phases, int size, size_t lead, size_t depth)
      : phases_(phases), size_(static_cast<size_t>(size)), depth_(depth) {
    staged_rounds(trace_, 4 * lead + 4 + depth, lead);
  }

  bool safe() {
    std::vector<State> left{State(size_, 0)};
    std::set<State> seen{left.back()};
    while (!left.empty()) {
      const State state = left.back();
      left.pop_back();
      for (size_t rank = 0; rank < size_; ++rank) {
        if (state[rank] == trace_.steps.size() || waits(state, rank)) continue;
        if (overwrites(state, trace_.steps[state[rank]])) return false;
        State next = state;
        ++next[rank];
        if (seen.insert(next).second) left.push_back(next);
      }
    }
    return true;
  }

 private:
  using State = std::vector<size_t>;
  using Kind = Trace::Kind;

  bool finished(const State& state, size_t rank, Kind kind, size_t round) const {
    const auto end = trace_.steps.begin() + static_cast<std::ptrdiff_t>(state[rank]);
    return std::any_of(trace_.steps.begin(), end, [&](const Trace::Step& step) {
      return step.kind == kind && step.round == round;
    });
  }

  bool all_finished(const State& state, Kind kind, size_t round) const {
    for (size_t rank = 0; rank < size_; ++rank) {
      if (!finished(state, rank, kind, round)) return false;
    }
    return true;
  }

  /// For whom: combine for all to have prepared; an allreduce's collect for all to have combined.
  bool waits(const State& state, size_t rank) const {
    const Trace::Step step = trace_.steps[state[rank]];
    if (step.kind == Trace::combines) return !all_finished(state, Trace::prepares, step.round);
    const bool awaits_results = step.kind == Trace::collects && phases_ == Phases::allreduce;
    return awaits_results && !all_finished(state, Trace::combines, step.round);
  }

  /// Whether somebody may still have to read what lies in the slots that this step writes to.
  /// Contributions are written in prepare and read in combine; results are written in combine, in
  /// place of contributions, or in prepare where nothing is reduced, and read in collect.
  bool overwrites(const State& state, const Trace::Step& step) const {
    if (step.kind != Trace::prepares || step.round < depth_) return false;
    const Kind last = phases_ == Phases::reduce_scatter ? Trace::combines : Trace::collects;
    return !all_finished(state, last, step.round - depth_);
  }

  Phases phases_;
  size_t size_, depth_;
  Trace trace_;
};

size_t smallest_safe_depth(Phases phases, int size, size_t lead) {
  size_t depth = 1;
  while (!Explorer(phases, size, lead, depth).safe()) ++depth;
  return depth;
}

void test_every_order() {
  for (const int size : {2, 3}) {
    for (size_t lead = 0; lead <= (size == 2 ? 3 : 2); ++lead) {
      const size_t expected[] = {2 * lead + 2, 3 * lead + 2, 3 * lead + 2};  // as all_phases
      for (size_t i = 0; i < 3; ++i) {
        const size_t depth = smallest_safe_depth(all_phases[i], size, lead);
        check(depth == expected[i], std::string(names[i]) + ", lead " + std::to_string(lead) +
                                        ": the smallest safe depth is " + std::to_string(depth));
        check(depth <= safe_depth(lead), "safe_depth is too small");
      }
    }
  }
}

// ---- Many random orders, with data

constexpr size_t chunk = 3;

int64_t input(int rank, size_t index, size_t call) {
  return static_cast<int64_t>((index + call) * 7 % 101) * (rank + 1);
}

/// One rank's tensors in one call.
struct Tensors {
  std::vector<int64_t> inputs, outputs;
  Message message;

  Tensors(int rank, int size, size_t count, size_t call) : inputs(count), outputs(count) {
    for (size_t i = 0; i < count; ++i) inputs[i] = input(rank, i, call);
    message = {{Dtype::i64, Op::sum, size},
               sizeof(int64_t),
               {{0, count, reinterpret_cast<char*>(inputs.data())}},
               {{0, count, reinterpret_cast<char*>(outputs.data())}}};
  }
};

bool is_right(Phases phases, const Tensors& tensors, int rank, const Blocks& blocks, size_t call) {
  for (int owner = 0; owner < blocks.size(); ++owner) {
    if (phases == Phases::reduce_scatter && owner != rank) continue;
    for (size_t i = blocks[owner].offset; i < blocks[owner].end(); ++i) {
      int64_t expected = 0;
      for (int from = 0; from < blocks.size(); ++from) expected += input(from, i, call);
      if (phases == Phases::allgather) expected = input(owner, i, call);
      if (tensors.outputs[i] != expected) return false;
    }
  }
  return true;
}

/// Calls of the given phases in a row, without a meeting between them. The first failure, or "".
std::string run_calls(const std::vector<Phases>& calls, int size, size_t lead, size_t depth,
                      bool claims, uint64_t seed) {
  Machine machine;
  machine.claims = claims;
  Fibers fibers(size, Order::random, seed);
  Staging staging(fibers, machine, size, depth);
  fibers.run([&](int rank) {
    uint64_t rounds_before = 0;
    for (size_t call = 0; call < calls.size(); ++call) {
      // Long calls, and some of a round or two.
      const size_t rounds = (seed + call) % 3 == 0 ? 1 + seed % 2 : depth + 3 * lead + 3;
      const Blocks blocks = Blocks::even(rounds * chunk * static_cast<size_t>(size) - 1, size);
      Tensors tensors(rank, size, blocks.count(), call);
      Counts counts;
      Staged staged(staging, rank, calls[call], blocks, chunk, rounds_before, tensors.message,
                    counts);
      staged_rounds(staged, staged.rounds(), lead);
      rounds_before += staged.rounds();
      if (!fibers.stopped() && !is_right(calls[call], tensors, rank, blocks, call)) {
        fibers.fail("wrong result");
      }
    }
  });
  return fibers.failure();
}

void test_safe_depth_is_safe() {
  for (const int size : {2, 3, 5, 8}) {
    for (size_t lead = 0; lead <= 3; ++lead) {
      for (uint64_t seed = 0; seed < 60; ++seed) {
        Random random(seed);
        std::vector<Phases> calls;
        for (int call = 0; call < 4; ++call) calls.push_back(all_phases[random.below(3)]);
        const std::string failure =
            run_calls(calls, size, lead, safe_depth(lead), seed % 2 == 1, seed);
        check(failure.empty(), std::to_string(size) + " ranks, lead " + std::to_string(lead) +
                                   ", seed " + std::to_string(seed) + ": " + failure);
      }
    }
  }
}

/// The random orders are wild enough: they find what happens with a slot less than necessary.
void test_less_is_found_out() {
  for (const int size : {2, 3, 5}) {
    for (size_t lead = 0; lead <= 3; ++lead) {
      const size_t too_small[] = {2 * lead + 1, 3 * lead + 1, 3 * lead + 1};  // as all_phases
      for (size_t i = 0; i < 3; ++i) {
        const std::vector<Phases> calls(2, all_phases[i]);
        bool found = false;
        for (uint64_t seed = 0; seed < 3000 && !found; ++seed) {
          found = !run_calls(calls, size, lead, too_small[i], false, seed).empty();
        }
        check(found, std::string(names[i]) + " by " + std::to_string(size) + ", lead " +
                         std::to_string(lead) + ": nothing happened");
      }
    }
  }
}

// ---- One shot

/// Several calls in a row, their inputs in `places` by turns.
std::string run_one_shots(int size, size_t places, uint64_t seed) {
  const Machine machine;
  const size_t count = 5;
  Fibers fibers(size, Order::random, seed);
  const Blocks blocks = Blocks::even(count, size);
  SharedMemory shared(fibers, machine, blocks, count, places);
  fibers.run([&](int rank) {
    Window window(shared, rank);
    for (size_t call = 0; call < 6; ++call) {
      Tensors tensors(rank, size, count, call);
      Counts counts;
      window.begin(tensors.message, counts);
      one_shot_allreduce(window, count);
      if (!fibers.stopped() && !is_right(Phases::allreduce, tensors, rank, blocks, call)) {
        fibers.fail("wrong result");
      }
    }
  });
  return fibers.failure();
}

void test_one_shot_needs_two_places() {
  for (const int size : {2, 3, 5, 8}) {
    bool found = false;
    for (uint64_t seed = 0; seed < 300; ++seed) {
      const std::string failure = run_one_shots(size, 2, seed);
      check(failure.empty(), "one_shot by " + std::to_string(size) + ": " + failure);
      found |= !run_one_shots(size, 1, seed).empty();
    }
    check(found, "one_shot by " + std::to_string(size) + ": a single place would do");
  }
}

/// Ranks that disagree on the number of elements all hear of it, and nobody's memory is touched.
void test_mismatch() {
  const int size = 3;
  const Machine machine;
  Fibers fibers(size, machine.order, 0);
  SharedMemory shared(fibers, machine, Blocks::even(8, size), 4);
  int refused = 0, untouched = 0;
  fibers.run([&](int rank) {
    const size_t count = rank == 1 ? 8 : 6;
    Tensors tensors(rank, size, count, 0);
    Counts counts;
    Window window(shared, rank);
    window.begin(tensors.message, counts);
    refused += !one_shot_allreduce(window, count);
    untouched += tensors.outputs == std::vector<int64_t>(count);
  });
  check(refused == size && untouched == size && !fibers.stopped(), "a mismatch is seen by all");
}

void test_all() {
  test_every_order();
  test_safe_depth_is_safe();
  test_less_is_found_out();
  test_one_shot_needs_two_places();
  test_mismatch();
}

}  // namespace
}  // namespace ringreduce::sim

int main() {
  ringreduce::sim::test_all();
  std::printf("staging: %d failures\n", ringreduce::sim::num_failures);
  return ringreduce::sim::num_failures == 0 ? 0 : 1;
}
