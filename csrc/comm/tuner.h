// Which algorithm a collective takes: a pure function of values that all ranks agree on, so no two
// ranks ever choose differently. To add an algorithm: a header in algorithms/, a row here, a branch
// in collective.cpp.
#pragma once

#include <cstddef>
#include <string>

#include "base/dtype.h"
#include "base/header.h"

namespace ringreduce {

enum class Algorithm : int { automatic, one_shot, two_shot, ring, tree };

inline constexpr const char* algorithm_names[] = {"auto", "one_shot", "two_shot", "ring", "tree"};

struct Choice {
  Algorithm algorithm;
};

class Tuner {
 public:
  /// `wanted`: what the user asked for; `claims`: whether ranks outnumber cores.
  Tuner(Algorithm wanted, bool claims) : wanted_(wanted), claims_(claims) {}

  Choice choose(Kind kind, size_t message_bytes) const;
  /// An allreduce among kernels. two_shot includes its staged form.
  Choice choose_on_gpu(Dtype dtype, size_t message_bytes) const;
  /// Whether one rank reduces such a message faster than it can wake others to help.
  bool small(size_t message_bytes) const;
  /// Ring or tree over all ranks, because it was asked for.
  bool needs_wire() const { return wanted_ == Algorithm::ring || wanted_ == Algorithm::tree; }

 private:
  Algorithm wanted_;
  bool claims_;
};

}  // namespace ringreduce
