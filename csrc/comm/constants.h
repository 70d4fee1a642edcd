// What links cost, by class of link: the one place of these numbers in the source, with where they
// were measured. `python -m ringreduce.tune` measures a cluster's own, and RINGREDUCE_TUNING puts
// them in their place. Nothing is decided here: that is the tuner's.
#pragma once

#include <map>
#include <string>

#include "algorithms/cost.h"

namespace ringreduce {

/// Some constants by name, in place of the source's; equal on all ranks of a job.
using Measured = std::map<std::string, double>;

struct Constants {
  // Between nodes. A network that nobody has measured is taken for 10 Gbit/s, shared by the ranks
  // of a node; a message of Open MPI over TCP took 20 us between two network namespaces.
  double network_us = 20;               // latency of a message
  double network_rank_gb_per_s = 1.25;  // what a rank sends while the others of its node rest
  double network_node_gb_per_s = 1.25;  // what a node's ranks send together

  // Inside a node: 2 ranks on two cores of an AMD EPYC (Zen 4), float32; rates of 16 MB in private
  // memory. At 2 KB one_shot took 0.87 of two_shot's time in private and 0.86 in symmetric memory,
  // at 4 KB 0.89 and 0.88, at 8 KB 0.90 and 0.97, at 16 KB 0.89 and 1.11, at 32 KB 0.96 and 1.28.
  double meeting_us = 0.7;       // until all have seen that all have come
  double inside_gb_per_s = 12;   // what a rank fetches from others' memory, and adds
  double one_shot_bytes = 8192;  // largest message that all reduce by themselves, in one meeting

  /// Where ranks outnumber cores: 8 ranks on the same two. At 1 KB 0.98 and 1.04, at 2 KB 0.97 and
  /// 1.03, at 4 KB 1.00 and 1.07, at 8 KB 1.06 and 1.15.
  static Constants of_shared_cores() {
    Constants constants;
    constants.meeting_us = 13.5;
    constants.inside_gb_per_s = 2.4;
    constants.one_shot_bytes = 2048;
    return constants;
  }

  /// Throws for a name that is none of these.
  void replace(const Measured& measured);

  Link inside() const { return {meeting_us * 1e-6, 1e-9 / inside_gb_per_s}; }
  /// As each of a node's `rails` ranks sees the network while all of them send.
  Link rail(int rails) const {
    const double own = 1 / network_rank_gb_per_s, shared = rails / network_node_gb_per_s;
    return {network_us * 1e-6, 1e-9 * (own > shared ? own : shared)};
  }
};

struct ConstantName {
  const char* name;
  double Constants::* value;
};
inline constexpr ConstantName constant_names[] = {
    {"network_us", &Constants::network_us},
    {"network_rank_gb_per_s", &Constants::network_rank_gb_per_s},
    {"network_node_gb_per_s", &Constants::network_node_gb_per_s},
    {"meeting_us", &Constants::meeting_us},
    {"inside_gb_per_s", &Constants::inside_gb_per_s},
    {"one_shot_bytes", &Constants::one_shot_bytes},
};

}  // namespace ringreduce
