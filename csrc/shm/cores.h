// How many cores this process may use: its affinity mask and its cgroup's quota. mpirun often binds
// each rank to one core, so only the union over a node's ranks tells what the node's ranks have
// together.
#pragma once

#include <string>

namespace ringreduce {

/// The affinity mask as bytes, one bit per core; to be sent to peers.
std::string affinity_mask();

/// The number of cores in the union of such masks.
int cores_in_union(const std::string* masks, int num_masks);

/// The cgroup's quota in cores, rounded down but at least 1; a large number if there is none.
int cgroup_quota();

}  // namespace ringreduce
