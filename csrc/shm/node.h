// A node: the ranks that proved that they share memory, joined by unix sockets in a star around its
// first rank. The sockets carry what is slow and rare: memory for new segments, and small messages
// that go with it. They stay open for the life of the communicator. No rank listens on a network.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "base/exchange.h"
#include "shm/segment.h"

namespace ringreduce {

class Node {
 public:
  /// Collective over all ranks of `exchange`. Finds the ranks of this node and connects them.
  /// `host`: ranks that give different ones are taken to be on different hosts.
  Node(int rank, int size, const Exchange& exchange, bool in_process, const std::string& host,
       Deadline deadline);
  ~Node();

  int local_rank() const { return local_rank_; }
  int local_size() const { return static_cast<int>(ranks().size()); }
  /// Ranks of the communicator, by local rank.
  const std::vector<int>& ranks() const { return nodes_[static_cast<size_t>(node_)]; }
  int num_nodes() const { return static_cast<int>(nodes_.size()); }
  /// The ranks of all nodes, this one among them, in the order of their first ranks.
  const std::vector<std::vector<int>>& nodes() const { return nodes_; }
  int node() const { return node_; }
  /// Cores that the node's ranks may use together: the union of their affinity masks, at most the
  /// cgroup's quota.
  int cores() const { return cores_; }

  /// Collective over the node: every rank contributes a block of `size_bytes`. All fail if one
  /// fails.
  Segment create_segment(size_t size_bytes, Deadline deadline);

  /// Collective over the node: an allgather of small messages through the sockets.
  std::vector<std::string> exchange(const std::string& message, Deadline deadline);

 private:
  void connect(const Exchange& exchange, Deadline deadline);
  void close_sockets();
  struct Fd;
  void exchange_fds(std::vector<Fd>& fds, Deadline deadline);
  void share_memfds(Segment& segment, Deadline deadline);
  void share_pages(Segment& segment, Deadline deadline);
  void throw_alike(const std::string& failure, Deadline deadline);

  int local_rank_ = 0, node_ = 0, cores_ = 1;
  std::vector<std::vector<int>> nodes_;
  bool in_process_;
  std::vector<int> sockets_;  // leader: by local rank (own: -1); others: one, to the leader
};

}  // namespace ringreduce
