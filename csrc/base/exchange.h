// What a Bootstrap gives: how the ranks of a communicator find each other.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace ringreduce {

/// An allgather of small messages among all ranks of a communicator, in rank order.
using Exchange = std::function<std::vector<std::string>(const std::string&)>;

}  // namespace ringreduce
