#include "sim/simulate.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "algorithms/doubling.h"
#include "algorithms/one_shot.h"
#include "algorithms/ring.h"
#include "algorithms/tree.h"
#include "algorithms/two_shot.h"
#include "sim/staged.h"
#include "sim/window.h"
#include "sim/wire.h"

namespace ringreduce::sim {
namespace {

/// What all ranks of a run have in common.
struct World {
  const Problem& problem;
  const Machine& machine;
  Fibers fibers;
  std::vector<Message> messages;
  std::vector<Counts> counts;
};

bool scatters(Algorithm algorithm) {
  return algorithm == Algorithm::ring_reduce_scatter ||
         algorithm == Algorithm::staged_reduce_scatter;
}
bool gathers(Algorithm algorithm) {
  return algorithm == Algorithm::ring_allgather || algorithm == Algorithm::staged_allgather;
}

size_t tensor_bytes(const Problem& problem) {
  return problem.blocks.count() * size_of(problem.reduction.dtype);
}

Message message_of(Algorithm algorithm, const Problem& problem, int rank) {
  const size_t item_bytes = size_of(problem.reduction.dtype);
  const size_t skip_bytes = static_cast<size_t>(rank) * tensor_bytes(problem);
  const Chunk all{0, problem.blocks.count()}, own = problem.blocks[rank];
  const auto run = [&](const char* tensors, Chunk part) {
    char* data = const_cast<char*>(tensors) + skip_bytes + part.offset * item_bytes;
    return Runs{{part.offset, part.length, data}};
  };
  return {problem.reduction, item_bytes, run(problem.inputs, gathers(algorithm) ? own : all),
          run(problem.outputs, scatters(algorithm) ? own : all)};
}

/// An allgather begins with every rank's own block in its output.
void place_own_block(const Message& message) {
  for (const Run& own : message.inputs) {
    message.for_each_run(message.outputs, {own.offset, own.count}, [&](char* output, Chunk part) {
      std::memmove(output, own.data, part.length * message.item_bytes);
    });
  }
}

void run_on_wires(Algorithm algorithm, World& world) {
  const Blocks& blocks = world.problem.blocks;
  const size_t chunk = world.problem.chunk;
  const int size = blocks.size();
  Network network(world.fibers, world.machine, size);
  world.fibers.run([&](int rank) {
    const Message& message = world.messages[static_cast<size_t>(rank)];
    Wire wire(network, rank, message, world.counts[static_cast<size_t>(rank)]);
    const Ring ring{rank, size};
    switch (algorithm) {
      case Algorithm::ring_allreduce:
        return ring_allreduce(wire, ring, blocks, chunk, world.problem.lanes);
      case Algorithm::ring_reduce_scatter:
        return ring_reduce_scatter(wire, ring, blocks, chunk, world.problem.lanes);
      case Algorithm::ring_allgather:
        place_own_block(message);
        return ring_allgather(wire, ring, blocks, chunk, world.problem.lanes);
      case Algorithm::doubling_allreduce:
        return doubling_allreduce(wire, rank, size, blocks.count(), chunk);
      default:
        return tree_allreduce(wire, rank, size, blocks.count(), chunk);
    }
  });
  if (network.messages_left() > 0) world.fibers.fail("messages were sent that nobody received");
}

void run_on_window(Algorithm algorithm, World& world) {
  SharedMemory shared(world.fibers, world.machine, world.problem.blocks, world.problem.chunk);
  world.fibers.run([&](int rank) {
    Window window(shared, rank);
    window.begin(world.messages[static_cast<size_t>(rank)],
                 world.counts[static_cast<size_t>(rank)]);
    if (algorithm == Algorithm::one_shot) {
      one_shot_allreduce(window, world.problem.blocks.count());
    } else if (window.arrive()) {
      two_shot_allreduce(window);
    }
  });
}

void run_staged(Algorithm algorithm, World& world) {
  const Problem& problem = world.problem;
  const auto phases = scatters(algorithm)  ? Staged::Phases::reduce_scatter
                      : gathers(algorithm) ? Staged::Phases::allgather
                                           : Staged::Phases::allreduce;
  Staging staging(world.fibers, world.machine, problem.blocks.size(), safe_depth(problem.lead));
  world.fibers.run([&](int rank) {
    Staged staged(staging, rank, phases, problem.blocks, problem.chunk, 0,
                  world.messages[static_cast<size_t>(rank)],
                  world.counts[static_cast<size_t>(rank)]);
    staged_rounds(staged, staged.rounds(), problem.lead);
  });
}

void validate(const Problem& problem, const Machine& machine) {
  const Reduction& reduction = problem.reduction;
  if (problem.chunk == 0) throw std::invalid_argument("a chunk has at least one element");
  if (problem.lanes == 0) throw std::invalid_argument("a ring has at least one lane");
  if (machine.slots == 0) throw std::invalid_argument("a FIFO has at least one slot");
  if (reduction.size != problem.blocks.size() || reduction.size < 1) {
    throw std::invalid_argument("there is one block for each rank, and at least one rank");
  }
  if (!supports(reduction.op, reduction.dtype)) {
    throw std::invalid_argument(std::string(name_of(reduction.op)) + " is not defined for " +
                                name_of(reduction.dtype));
  }
}

}  // namespace

Outcome simulate(Algorithm algorithm, const Problem& problem, const Machine& machine) {
  validate(problem, machine);
  const size_t size = static_cast<size_t>(problem.blocks.size());
  if (size == 1) {
    if (problem.outputs != problem.inputs) {
      std::copy_n(problem.inputs, tensor_bytes(problem), problem.outputs);
    }
    return {"", std::vector<Counts>(1), 0};
  }
  World world{problem,
              machine,
              Fibers(problem.blocks.size(), machine.order, machine.seed),
              {},
              std::vector<Counts>(size)};
  for (int rank = 0; rank < problem.blocks.size(); ++rank) {
    world.messages.push_back(message_of(algorithm, problem, rank));
  }
  switch (algorithm) {
    case Algorithm::ring_allreduce:
    case Algorithm::ring_reduce_scatter:
    case Algorithm::ring_allgather:
    case Algorithm::tree_allreduce:
    case Algorithm::doubling_allreduce:
      run_on_wires(algorithm, world);
      break;
    case Algorithm::one_shot:
    case Algorithm::two_shot:
      run_on_window(algorithm, world);
      break;
    case Algorithm::staged_allreduce:
    case Algorithm::staged_reduce_scatter:
    case Algorithm::staged_allgather:
      run_staged(algorithm, world);
      break;
  }
  double finish_s = 0;
  for (const Counts& counts : world.counts) finish_s = std::max(finish_s, counts.finish_s);
  return {world.fibers.failure(), std::move(world.counts), finish_s};
}

std::optional<Cost> cost_of(Algorithm algorithm, const Problem& problem, int rank) {
  const Blocks& blocks = problem.blocks;
  switch (algorithm) {
    case Algorithm::ring_allreduce:
      return ring_allreduce_cost(blocks, problem.chunk, rank);
    case Algorithm::ring_reduce_scatter:
      return ring_reduce_scatter_cost(blocks, problem.chunk, rank);
    case Algorithm::ring_allgather:
      return ring_allgather_cost(blocks, problem.chunk, rank);
    case Algorithm::tree_allreduce:
      return tree_allreduce_cost(blocks.count(), blocks.size(), problem.chunk, rank);
    case Algorithm::doubling_allreduce:
      return doubling_allreduce_cost(blocks.count(), blocks.size(), problem.chunk, rank);
    case Algorithm::one_shot:
      return one_shot_cost(blocks.count(), blocks.size());
    case Algorithm::two_shot:
      return two_shot_cost(blocks, rank);
    default:
      return std::nullopt;
  }
}

}  // namespace ringreduce::sim
