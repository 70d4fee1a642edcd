// Which algorithm a collective takes: a pure function of values that all ranks agree on, so no two
// ranks ever choose differently. To add an algorithm: a header in algorithms/, a row here, a branch
// in on_node.cpp.
#pragma once

#include <cstddef>
#include <string>

#include "algorithms/choice.h"
#include "base/dtype.h"
#include "base/header.h"
#include "comm/constants.h"

namespace ringreduce {

enum class Algorithm : int { automatic, one_shot, two_shot, ring, tree };

inline constexpr const char* algorithm_names[] = {"auto", "one_shot", "two_shot", "ring", "tree"};

constexpr const char* name_of(Algorithm algorithm) {
  return algorithm_names[static_cast<int>(algorithm)];
}

/// What an allreduce would take.
struct Forecast {
  std::string algorithm;
  size_t segments = 1;
  size_t chunk_bytes = 0;  // of a message between nodes; 0: there is none, or it is not cut
  double time_s = 0;
};

class Tuner {
 public:
  /// `wanted`: what the user asked for; `claims`: whether ranks outnumber cores on this node.
  Tuner(Algorithm wanted, bool claims, const Measured& measured = {});

  Algorithm choose(Kind kind, size_t message_bytes) const;
  /// An allreduce among kernels. two_shot includes its staged form.
  Algorithm choose_on_gpu(Dtype dtype, size_t message_bytes) const;
  /// Whether one rank reduces such a message faster than it can wake others to help.
  bool small(size_t message_bytes) const;
  /// Ring or tree over all ranks, because it was asked for.
  bool needs_wire() const { return wanted_ == Algorithm::ring || wanted_ == Algorithm::tree; }

  /// How the sum of `count` elements goes across nodes.
  NodesChoice across(size_t count, NodesShape shape, Dtype dtype) const;
  /// Elements of a chunk with which such a sum of GPU memory crosses nodes by a ring of the GPUs
  /// (direct.h); 0: the host, which has other algorithms, is sooner.
  size_t direct_chunk(size_t count, NodesShape shape, Dtype dtype) const;
  /// A node's link to the next one, as each of its `rails` sees it.
  Link rail(int rails) const { return agreed_.rail(rails); }

  /// Of `message_bytes` of float32 in private memory.
  Forecast forecast(size_t message_bytes, NodesShape shape) const;

  const Constants& constants() const { return here_; }

 private:
  Forecast forecast_wire(size_t count, int nodes, int local_size) const;
  Forecast forecast_node(size_t count, int size) const;

  Algorithm wanted_;
  Constants here_;    // on this node
  Constants agreed_;  // equal on all nodes, also where only some have a core for each rank
};

}  // namespace ringreduce
