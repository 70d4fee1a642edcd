// The simulator for Python: one collective on virtual ranks, with what it moved and how long it
// took.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>

#include "bindings/bindings.h"
#include "sim/simulate.h"

namespace nb = nanobind;

namespace ringreduce {
namespace {

/// (ranks, bytes of a message)
using Messages = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

sim::Algorithm algorithm_of(const std::string& name) {
  const auto found =
      std::find(std::begin(sim::algorithm_names), std::end(sim::algorithm_names), name);
  if (found == std::end(sim::algorithm_names)) {
    throw std::invalid_argument("there is no algorithm \"" + name + "\"");
  }
  return static_cast<sim::Algorithm>(found - std::begin(sim::algorithm_names));
}

/// Where each block begins, and where the last one ends.
std::vector<size_t> offsets_of(const std::vector<size_t>& lengths) {
  std::vector<size_t> offsets{0};
  for (const size_t length : lengths) offsets.push_back(offsets.back() + length);
  return offsets;
}

nb::dict dict_of(const sim::Counts& counts) {
  nb::dict result;
  result["primitives"] = counts.primitives;
  result["messages"] = counts.messages;
  result["bytes_sent"] = counts.bytes_sent;
  result["bytes_received"] = counts.bytes_received;
  result["finish_s"] = counts.finish_s;
  return result;
}

nb::dict dict_of(const Cost& cost, Link link, Dtype dtype) {
  nb::dict result;
  result["steps"] = cost.steps;
  result["moved_bytes"] = cost.moved.bytes(dtype);
  result["time_s"] = cost.time_s(link, dtype);
  return result;
}

nb::object array_of(std::unique_ptr<char[]> data, size_t ranks, size_t message_bytes) {
  char* bytes = data.release();
  nb::capsule owner(bytes, [](void* bytes) noexcept { delete[] static_cast<char*>(bytes); });
  return nb::cast(nb::ndarray<nb::numpy, uint8_t>(bytes, {ranks, message_bytes}, owner));
}

nb::dict simulate(const std::string& name, Messages inputs, int dtype, int op, size_t chunk,
                  std::optional<std::vector<size_t>> lengths, double alpha_s,
                  double beta_s_per_byte, size_t slots, bool claims, bool random_order,
                  double max_delay_s, uint64_t seed, size_t lead) {
  const sim::Algorithm algorithm = algorithm_of(name);
  const int size = static_cast<int>(inputs.shape(0));
  if (op < 0 || op >= num_ops) throw std::invalid_argument("there is no such op");
  const Reduction reduction{static_cast<Dtype>(dtype), static_cast<Op>(op), size};
  const size_t message_bytes = inputs.shape(1), item_bytes = size_of(reduction.dtype);
  if (item_bytes == 0 || message_bytes % item_bytes != 0) {
    throw std::invalid_argument("messages consist of whole elements of a known dtype");
  }
  const std::vector<size_t> offsets = offsets_of(lengths.value_or(std::vector<size_t>{}));
  if (lengths &&
      (lengths->size() != inputs.shape(0) || offsets.back() != message_bytes / item_bytes)) {
    throw std::invalid_argument("lengths has one entry per rank, which add up to a message");
  }
  const Blocks blocks = lengths ? Blocks::table(offsets.data(), size)
                                : Blocks::even(message_bytes / item_bytes, std::max(size, 1));
  auto outputs = std::make_unique<char[]>(inputs.nbytes());
  const sim::Problem problem{
      reduction, blocks, chunk, reinterpret_cast<const char*>(inputs.data()), outputs.get(), lead};
  const sim::Order order = random_order ? sim::Order::random : sim::Order::by_time;
  const sim::Machine machine{{alpha_s, beta_s_per_byte}, slots, claims, order, max_delay_s, seed};
  sim::Outcome outcome;
  {
    nb::gil_scoped_release release;
    outcome = sim::simulate(algorithm, problem, machine);
  }
  if (!outcome.failure.empty()) throw std::runtime_error(outcome.failure);
  nb::list ranks, costs;
  for (int rank = 0; rank < size; ++rank) {
    ranks.append(dict_of(outcome.ranks[static_cast<size_t>(rank)]));
    const std::optional<Cost> cost = sim::cost_of(algorithm, problem, rank);
    if (cost) costs.append(dict_of(*cost, machine.link, reduction.dtype));
  }
  nb::dict result;
  result["outputs"] = array_of(std::move(outputs), inputs.shape(0), message_bytes);
  result["finish_s"] = outcome.finish_s;
  result["ranks"] = ranks;
  result["costs"] = costs;
  return result;
}

}  // namespace

void register_simulation(nb::module_& m) {
  nb::list names;
  for (const char* name : sim::algorithm_names) names.append(name);
  m.attr("SIMULATED_ALGORITHMS") = nb::tuple(names);
  m.def(
      "simulate", &simulate, nb::arg("algorithm"), nb::arg("inputs"), nb::arg("dtype"),
      nb::arg("op"), nb::arg("chunk"), nb::kw_only(), nb::arg("lengths") = nb::none(),
      nb::arg("alpha_s") = 1.0, nb::arg("beta_s_per_byte") = 0.0, nb::arg("slots") = 2,
      nb::arg("claims") = false, nb::arg("random_order") = false, nb::arg("max_delay_s") = 0.0,
      nb::arg("seed") = 0, nb::arg("lead") = 1,
      "Runs a collective on virtual ranks, in virtual time (csrc/sim/machine.h has the model).\n\n"
      "inputs: uint8 array (ranks, bytes of a message), one message per rank; dtype, op: numbers\n"
      "of DTYPES and OPS; chunk: elements per message, slice, or block and round; lengths:\n"
      "elements of each rank's block (None: equal ones). The defaults count steps: the time is\n"
      "the number of messages on the longest chain.\n\n"
      "Returns outputs (like inputs), finish_s, ranks (primitives, messages, bytes_sent,\n"
      "bytes_received, finish_s of each) and costs (steps, moved_bytes, time_s of each by the\n"
      "formulas; empty for staged rounds). Raises RuntimeError for a deadlock or a schedule that\n"
      "goes wrong, ValueError for what makes no sense.");
}

}  // namespace ringreduce
