// Steps of which a collective across nodes is made: inside a node through its window, and between
// nodes over wires. They throw if the communicator is aborted. They choose nothing.
#pragma once

#include <vector>

#include "comm/collective.h"
#include "shm/staged.h"

namespace ringreduce {

class Steps {
 public:
  /// All outlive it.
  Steps(Core& core, const Header& header, GroupWatch& watch)
      : core_(core), header_(header), watch_(watch) {}

  Core& core() { return core_; }
  Cluster& cluster() { return *core_.cluster; }
  GroupWatch& watch() { return watch_; }
  const Group& group() const { return core_.group; }
  Ring ring_of_nodes() const { return {core_.cluster->node(), core_.cluster->nodes()}; }

  void staged(const Message& message, Staged::Phases phases, const Blocks& blocks);

  /// Block l of local rank l's outputs goes to the outputs of all ranks of the node.
  void allgather_inside(const Message& message, const Blocks& blocks);

  /// `sums` becomes this rank's block of the node's sum, as partial values: 16-bit floats are added
  /// as float32. `whole`: what the blocks cover.
  void sum_inside(const Message& message, Chunk whole, const Blocks& blocks,
                  std::vector<char>& sums);

  /// algorithm(wire, chunk) over the nodes. Any thread, with a watch of its own.
  template <class Algorithm>
  void over(NetWire& wire, const Message& message, Watch& watch, Algorithm algorithm) {
    wire.begin(message, watch);
    algorithm(wire, wire.chunk_elements());
    if (!wire.end()) throw_failure();
  }

  [[noreturn]] void throw_failure() const;

 private:
  Core& core_;
  const Header& header_;
  GroupWatch& watch_;
};

/// Partial sums go on: avg divides once, at the end.
inline Reduction unfinished(Reduction reduction) {
  if (reduction.op == Op::avg) reduction.op = Op::sum;
  return reduction;
}

}  // namespace ringreduce
