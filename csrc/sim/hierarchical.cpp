#include "sim/hierarchical.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <stdexcept>

#include "algorithms/doubling.h"
#include "algorithms/ring.h"
#include "algorithms/tree.h"
#include "sim/wire.h"

namespace ringreduce::sim {
namespace {

/// Moments at which the ranks of a node have done something to each segment.
struct Node {
  int size = 0, first_rank = 0;
  std::vector<std::vector<double>> prepared, finished;
};

/// What a rank hands to its fiber across and back: the number of segments, and when.
struct Shards {
  std::vector<char> sum;  // of the whole message; only this rank's shards are filled
  std::vector<double> started, finished;
};

struct World {
  const ClusterProblem& problem;
  const Cluster& cluster;
  Fibers fibers;
  std::vector<Node> nodes;
  std::vector<Shards> shards;         // by rank
  std::deque<Network> networks = {};  // by rail
  Ports ports = {};
  ClusterOutcome outcome = {};

  Dtype dtype() const { return problem.reduction.dtype; }
  size_t tensor_bytes() const { return problem.rails.count * size_of(dtype()); }
  const char* input(int rank) const {
    return problem.inputs + static_cast<size_t>(rank) * tensor_bytes();
  }
  char* output(int rank) const {
    return problem.outputs + static_cast<size_t>(rank) * tensor_bytes();
  }
};

/// The inside fiber of one rank: the Phases of hierarchical.h.
class Inside {
 public:
  Inside(World& world, int node, int local)
      : world_(world),
        fibers_(world.fibers),
        node_(world.nodes[static_cast<size_t>(node)]),
        local_(local),
        rank_(node_.first_rank + local),
        shards_(world.shards[static_cast<size_t>(rank_)]),
        counts_(world.outcome.inside[static_cast<size_t>(rank_)]),
        delays_(world.cluster.machine, rank_) {}

  void reduce_scatter(size_t segment) {
    if (!meet(node_.prepared[segment], "prepare")) return;
    const Chunk shard = part(segment, local_);
    std::vector<Source> sources;
    for (int peer = 0; peer < node_.size; ++peer) {
      sources.push_back(
          {world_.input(node_.first_rank + peer) + bytes(shard.offset), Format::storage});
    }
    const size_t partial_bytes = partial_size_of(world_.dtype());
    const Target target{shards_.sum.data() + shard.offset * partial_bytes, Format::partial};
    reduce(world_.problem.reduction, {&target, 1}, sources, shard.length);
    fetch(bytes(shard.length) * (sources.size() - 1));
  }

  void start(size_t) {
    if (local_ >= world_.problem.rails.rails) return;
    shards_.started.push_back(fibers_.clock());
    fibers_.wake(world_.problem.reduction.size + rank_);
  }

  void finish(size_t segment) {
    if (local_ >= world_.problem.rails.rails) return;
    const auto done = [this, segment] { return shards_.finished.size() > segment; };
    const auto what = [segment] { return "its shard of segment " + std::to_string(segment); };
    if (!fibers_.sleep(done, what)) return;
    fibers_.clock() = std::max(fibers_.clock(), shards_.finished[segment]);
  }

  void allgather(size_t segment) {
    if (!meet(node_.finished[segment], "finish")) return;
    for (int owner = 0; owner < world_.problem.rails.rails; ++owner) {
      const Chunk shard = part(segment, owner);
      if (owner == local_) continue;
      std::memcpy(world_.output(rank_) + bytes(shard.offset),
                  world_.output(node_.first_rank + owner) + bytes(shard.offset),
                  bytes(shard.length));
      fetch(bytes(shard.length));
    }
  }

 private:
  size_t bytes(size_t elements) const { return elements * size_of(world_.dtype()); }
  Chunk part(size_t segment, int owner) const {
    return owner < world_.problem.rails.rails ? world_.problem.rails.shard(segment, owner)
                                              : Chunk{};
  }

  /// All ranks of the node come here; the last one decides when they go on.
  bool meet(std::vector<double>& times, const char* what) {
    fibers_.clock() += delays_.next();
    times.push_back(fibers_.clock());
    const size_t all = static_cast<size_t>(node_.size);
    for (int peer = 0; peer < node_.size; ++peer) fibers_.wake(node_.first_rank + peer);
    if (!fibers_.sleep([&times, all] { return times.size() == all; },
                       [what] { return "the ranks of its node to " + std::string(what); })) {
      return false;
    }
    if (all == 1) return true;
    const double last = *std::max_element(times.begin(), times.end());
    fibers_.clock() = std::max(fibers_.clock(), last + world_.cluster.inside.alpha_s);
    return true;
  }

  void fetch(size_t size_bytes) {
    ++counts_.primitives;
    counts_.bytes_received += size_bytes;
    fibers_.clock() += static_cast<double>(size_bytes) * world_.cluster.inside.beta_s_per_byte;
  }

  World& world_;
  Fibers& fibers_;
  Node& node_;
  int local_, rank_;
  Shards& shards_;
  Counts& counts_;
  Delays delays_;
};

/// The allreduce of one shard by the nodes of its rail.
void allreduce_shard(World& world, Wire& wire, const Message& message, int node, Chunk shard) {
  const ClusterProblem& problem = world.problem;
  const int nodes = static_cast<int>(world.nodes.size());
  if (nodes == 1) {
    const Source source{message.inputs.front().data, Format::partial};
    const Target target{message.outputs.front().data, Format::storage};
    return reduce(problem.reduction, {&target, 1}, {&source, 1}, shard.length);
  }
  switch (problem.across) {
    case Across::ring:
      return ring_allreduce(wire, Ring{node, nodes}, Blocks::even(shard.length, nodes),
                            problem.chunk, problem.lanes);
    case Across::tree:
      return tree_allreduce(wire, node, nodes, shard.length, problem.chunk);
    case Across::doubling:
      return doubling_allreduce(wire, node, nodes, shard.length, problem.chunk);
  }
}

/// The other fiber of a rank: segment after segment, as soon as they are handed over.
void run_across(World& world, int node, int local) {
  const ClusterProblem& problem = world.problem;
  if (local >= problem.rails.rails) return;
  const int rank = world.nodes[static_cast<size_t>(node)].first_rank + local;
  Shards& shards = world.shards[static_cast<size_t>(rank)];
  const size_t partial_bytes = partial_size_of(world.dtype()), item_bytes = size_of(world.dtype());
  for (size_t segment = 0; segment < problem.rails.segments(); ++segment) {
    if (!world.fibers.sleep([&] { return shards.started.size() > segment; },
                            [=] { return "segment " + std::to_string(segment); })) {
      return;
    }
    double& clock = world.fibers.clock();
    clock = std::max(clock, shards.started[segment]);
    const Chunk shard = problem.rails.shard(segment, local);
    const Message message{problem.reduction,
                          item_bytes,
                          {{0, shard.length, shards.sum.data() + shard.offset * partial_bytes}},
                          {{0, shard.length, world.output(rank) + shard.offset * item_bytes}},
                          Format::partial};
    Wire wire(world.networks[static_cast<size_t>(local)], node, message,
              world.outcome.across[static_cast<size_t>(rank)]);
    allreduce_shard(world, wire, message, node, shard);
    shards.finished.push_back(clock);
    world.fibers.wake(rank);
  }
}

void validate(const ClusterProblem& problem, const Cluster& cluster) {
  const std::vector<int>& sizes = cluster.local_sizes;
  if (sizes.empty() || *std::min_element(sizes.begin(), sizes.end()) < 1) {
    throw std::invalid_argument("there is at least one node, and each has at least one rank");
  }
  if (problem.rails.rails < 1 ||
      problem.rails.rails > *std::min_element(sizes.begin(), sizes.end())) {
    throw std::invalid_argument("every node has a rank for every rail");
  }
  if (std::accumulate(sizes.begin(), sizes.end(), 0) != problem.reduction.size) {
    throw std::invalid_argument("the nodes' ranks are those of the reduction");
  }
  if (problem.chunk == 0 || problem.lanes == 0 || problem.rails.segment == 0 ||
      cluster.machine.slots == 0) {
    throw std::invalid_argument("chunk, lanes, segment and slots are at least one");
  }
  if (!supports(problem.reduction.op, problem.reduction.dtype)) {
    throw std::invalid_argument("the op is not defined for this dtype");
  }
}

/// One network per rail, of one rank per node; ports are per node and, unless shared, per rail.
void connect(World& world) {
  const int size = world.problem.reduction.size, rails = world.problem.rails.rails;
  world.ports.resize(world.nodes.size());
  for (int rail = 0; rail < rails; ++rail) {
    std::vector<int> fiber_of;
    for (const Node& node : world.nodes) fiber_of.push_back(size + node.first_rank + rail);
    world.networks.emplace_back(world.fibers, world.cluster.machine, std::move(fiber_of),
                                world.cluster.shared_port ? &world.ports : nullptr);
  }
}

}  // namespace

ClusterOutcome simulate(const ClusterProblem& problem, const Cluster& cluster) {
  validate(problem, cluster);
  const int size = problem.reduction.size;
  const size_t ranks = static_cast<size_t>(size), segments = problem.rails.segments();
  World world{problem,
              cluster,
              Fibers(2 * size, cluster.machine.order, cluster.machine.seed),
              {},
              std::vector<Shards>(ranks)};
  world.outcome.inside.resize(ranks);
  world.outcome.across.resize(ranks);
  std::vector<std::pair<int, int>> places;  // node and local rank, by rank
  for (const int local_size : cluster.local_sizes) {
    Node node{local_size, static_cast<int>(places.size()), {}, {}};
    node.prepared.resize(segments);
    node.finished.resize(segments);
    for (int local = 0; local < local_size; ++local) {
      places.emplace_back(static_cast<int>(world.nodes.size()), local);
    }
    world.nodes.push_back(std::move(node));
  }
  for (Shards& shards : world.shards) {
    shards.sum.resize(problem.rails.count * partial_size_of(problem.reduction.dtype));
  }
  connect(world);
  std::vector<double> finish_s(ranks);
  world.fibers.run([&](int fiber) {
    const int rank = fiber % size;
    const auto [node, local] = places[static_cast<size_t>(rank)];
    if (fiber >= size) return run_across(world, node, local);
    Inside inside(world, node, local);
    hierarchical_allreduce(inside, segments, problem.lead);
    finish_s[static_cast<size_t>(rank)] = world.fibers.clock();
  });
  world.outcome.finish_s = *std::max_element(finish_s.begin(), finish_s.end());
  for (const Network& network : world.networks) {
    if (network.messages_left() > 0) world.fibers.fail("messages were sent that nobody received");
  }
  world.outcome.failure = world.fibers.failure();
  return std::move(world.outcome);
}

}  // namespace ringreduce::sim
