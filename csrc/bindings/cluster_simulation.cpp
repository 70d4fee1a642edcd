// The simulated cluster, the formulas and the choice for Python: hierarchical on virtual ranks, and
// what cost.h and choice.h say of it.
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "algorithms/choice.h"
#include "bindings/bindings.h"
#include "sim/hierarchical.h"

namespace nb = nanobind;

namespace ringreduce {
namespace {

/// (ranks, bytes of a message)
using Messages = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
/// alpha in s, beta in s per byte
using LinkPair = std::pair<double, double>;

Link link_of(LinkPair link) { return {link.first, link.second}; }

Across across_of(const std::string& name) {
  const auto found = std::find(std::begin(across_names), std::end(across_names), name);
  if (found == std::end(across_names)) {
    throw std::invalid_argument("no algorithm \"" + name + "\" goes across nodes");
  }
  return static_cast<Across>(found - std::begin(across_names));
}

void validate(int nodes, int local_size, size_t chunk) {
  if (nodes < 1 || local_size < 1 || chunk < 1) {
    throw std::invalid_argument("nodes, ranks per node and chunks are at least one");
  }
}

nb::dict simulate_cluster(std::vector<int> local_sizes, Messages inputs, size_t segment,
                          const std::string& across, size_t chunk, LinkPair inside, LinkPair link,
                          size_t lead, size_t lanes, bool shared_port) {
  if (local_sizes.empty()) throw std::invalid_argument("there is at least one node");
  const int size = std::accumulate(local_sizes.begin(), local_sizes.end(), 0);
  if (inputs.shape(0) != static_cast<size_t>(size)) {
    throw std::invalid_argument("there is one message for each rank");
  }
  const Rails rails{*std::min_element(local_sizes.begin(), local_sizes.end()), inputs.shape(1),
                    segment};
  const auto outputs = std::make_unique<char[]>(inputs.nbytes());
  const sim::ClusterProblem problem{{Dtype::u8, Op::sum, size},
                                    rails,
                                    lead,
                                    across_of(across),
                                    chunk,
                                    lanes,
                                    reinterpret_cast<const char*>(inputs.data()),
                                    outputs.get()};
  sim::Cluster cluster{std::move(local_sizes), link_of(inside), {}, shared_port};
  cluster.machine.link = link_of(link);
  cluster.machine.slots = lanes + 1;
  sim::ClusterOutcome outcome;
  {
    nb::gil_scoped_release release;
    outcome = sim::simulate(problem, cluster);
  }
  if (!outcome.failure.empty()) throw std::runtime_error(outcome.failure);
  nb::list sent, fetched;
  for (const sim::Counts& counts : outcome.across) sent.append(counts.bytes_sent);
  for (const sim::Counts& counts : outcome.inside) fetched.append(counts.bytes_received);
  nb::dict result;
  result["finish_s"] = outcome.finish_s;
  result["bytes_across"] = sent;
  result["bytes_inside"] = fetched;
  result["checksum"] =
      std::accumulate(outputs.get(), outputs.get() + inputs.nbytes(), size_t{0},
                      [](size_t sum, char byte) { return sum + static_cast<unsigned char>(byte); });
  return result;
}

nb::dict predict_cluster(size_t count, int nodes, int local_size, size_t segment,
                         const std::string& across, size_t chunk, LinkPair inside, LinkPair link) {
  validate(nodes, local_size, chunk);
  const Rails rails{local_size, count, std::max<size_t>(segment, 1)};
  const AcrossChoice choice{across_of(across), chunk};
  // Of the trees' inner nodes, some rank has both children; it is never far from the first.
  Elements most;
  HierarchicalCost cost;
  for (int node = 0; node < std::min(nodes, 8); ++node) {
    cost = hierarchical_cost(rails, local_size, nodes, node, 0, choice.algorithm, chunk);
    if (cost.across_moved.bytes(Dtype::u8) > most.bytes(Dtype::u8)) most = cost.across_moved;
  }
  nb::dict result;
  result["steps"] = cost.segments * cost.across.steps;
  result["bytes_across"] = most.bytes(Dtype::u8);
  result["bytes_inside"] = cost.inside_moved.bytes(Dtype::u8);
  result["time_s"] = hierarchical_time_s(rails, local_size, nodes, choice, link_of(inside),
                                         link_of(link), Dtype::u8);
  return result;
}

nb::tuple choose(size_t count, int nodes, int local_size, LinkPair inside, LinkPair link,
                 size_t most_chunk) {
  validate(nodes, local_size, most_chunk);
  const NodesChoice choice =
      choose_hierarchical(count, {nodes, local_size, local_size}, link_of(inside), link_of(link),
                          Dtype::u8, most_chunk);
  return nb::make_tuple(name_of(choice.across.algorithm), choice.segment, choice.across.chunk,
                        choice.time_s);
}

}  // namespace

void register_cluster_simulation(nb::module_& m) {
  nb::list names;
  for (const char* name : across_names) names.append(name);
  m.attr("ACROSS_ALGORITHMS") = nb::tuple(names);
  m.def(
      "simulate_cluster", &simulate_cluster, nb::arg("local_sizes"), nb::arg("inputs"),
      nb::arg("segment"), nb::arg("across"), nb::arg("chunk"), nb::kw_only(), nb::arg("inside"),
      nb::arg("link"), nb::arg("lead") = 1, nb::arg("lanes") = 1, nb::arg("shared_port") = false,
      "Sums uint8 messages (ranks, bytes) hierarchically on virtual ranks, in virtual time.\n\n"
      "local_sizes: ranks of each node; segment, chunk: bytes; across: one of\n"
      "ACROSS_ALGORITHMS; inside, link: (alpha in s, beta in s per byte) in a node and across;\n"
      "shared_port: the ranks of a node share one way out. Returns finish_s, bytes_across and\n"
      "bytes_inside of each rank, and the sum of all bytes of all results. Raises ValueError for\n"
      "what makes no sense, RuntimeError for a deadlock or a wrong schedule.");
  m.def(
      "predict_cluster", &predict_cluster, nb::arg("count"), nb::arg("nodes"),
      nb::arg("local_size"), nb::arg("segment"), nb::arg("across"), nb::arg("chunk"), nb::kw_only(),
      nb::arg("inside"), nb::arg("link"),
      "The same by the formulas, for `count` bytes on equal nodes: steps across, bytes_across of\n"
      "the busiest rank, bytes_inside, time_s.");
  m.def("choose_cluster", &choose, nb::arg("count"), nb::arg("nodes"), nb::arg("local_size"),
        nb::kw_only(), nb::arg("inside"), nb::arg("link"), nb::arg("most_chunk"),
        "(across, segment, chunk, time_s): how `count` bytes best cross equal nodes, in chunks of\n"
        "most_chunk bytes at most.");
}

}  // namespace ringreduce
