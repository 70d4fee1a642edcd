// How the nodes of a communicator meet: their leaders compare what their ranks have called, and on
// the same messages a small sum travels along. Recursive doubling: in round k a node exchanges with
// the one whose number differs in bit k; nodes past the last power of two hand theirs to a partner
// first, and are told the result at the end. log2 n rounds, and two more for such nodes. The
// schedule is the same whatever is called, and all messages fit one size: so a mismatch leaves no
// message behind.
#pragma once

#include <memory>
#include <vector>

#include "net/links.h"
#include "reduce/reduce.h"

namespace ringreduce {

class Agreement {
 public:
  static constexpr size_t largest_payload_bytes = size_t{16} << 10;

  /// `leaders`: MPI's number of one rank per node.
  Agreement(std::shared_ptr<Mpi> mpi, std::vector<int> leaders, int node, int first_tag);

  /// A small sum: partial values, replaced by the sum over all nodes, added in an order that
  /// depends on nothing but the number of nodes.
  struct Payload {
    Reduction reduction{};
    char* data = nullptr;
    size_t count = 0;
  };
  enum class Verdict { agreed, differ, stopped };
  /// `digest`: of what must be equal; `differs`: whether it already is not, inside of this node.
  Verdict meet(uint64_t digest, bool differs, const Payload& payload, Watch& watch);

  void close() noexcept { links_.close(); }

 private:
  struct Note {
    uint64_t digest;
    uint32_t differs, payload_bytes;
  };
  struct State {
    Note note;
    const Payload& payload;
    Watch& watch;
    bool stopped = false;
  };
  void tell(State& state, int node);
  /// `replace`: the peer has the result already.
  void learn(State& state, int node, bool replace);

  Links links_;
  int node_, nodes_;
};

}  // namespace ringreduce
