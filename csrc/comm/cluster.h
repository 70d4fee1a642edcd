// What a communicator has more of when its ranks are on several nodes: the agreement of the nodes'
// leaders before a collective, wires between nodes, and the lifeline that carries failures. Local
// rank 0 of each node is its leader; local ranks below the number of rails carry a share of large
// messages to their peers on the other nodes.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "algorithms/choice.h"
#include "base/exchange.h"
#include "comm/engine.h"
#include "net/agreement.h"
#include "net/lifeline.h"
#include "net/wire.h"
#include "shm/group.h"

namespace ringreduce {

/// The MPI that carries data between nodes, and this rank's number in it.
struct Network {
  std::shared_ptr<Mpi> mpi;
  int rank = 0;
};

/// Throws if there is no MPI that can be used.
using OpenNetwork = std::function<Network()>;

class Cluster : public Remote {
 public:
  /// Collective over all ranks.
  Cluster(const Node& node, Group& group, int rank, const Exchange& exchange,
          const OpenNetwork& open_network, Deadline deadline);

  int node() const { return node_; }
  int nodes() const { return static_cast<int>(ranks_.size()); }
  bool leads() const { return group_.rank() == 0; }
  /// The smallest number of ranks on any node.
  int rails() const { return rails_; }
  NodesShape shape() const;
  bool carries() const { return group_.rank() < rails_; }
  /// Ranks of the communicator, by node.
  const std::vector<std::vector<int>>& ranks() const { return ranks_; }

  Agreement& agreement() { return *agreement_; }
  /// Over the nodes: among the leaders; among the carriers of this rank's rail.
  NetWire& leaders() { return *leaders_; }
  NetWire& rail() { return *rail_; }
  /// Over all ranks of the communicator, in their order.
  NetWire& all_ranks() { return *all_ranks_; }
  /// Among the carriers of this rank's rail, with what lies on a GPU: if every rank's MPI takes
  /// that. Opened once, before it is used.
  bool takes_device_memory() const { return takes_device_memory_; }
  void open_device_rail(WireDevice& device);
  NetWire& device_rail() { return *device_rail_; }
  /// After close(): whether MPI has none of its slots any more.
  bool device_rail_closed() const { return device_rail_closed_; }
  /// Drives the network while the caller works inside of the node.
  Engine& engine() { return *engine_; }

  std::optional<AbortRecord> find_lost(uint64_t sequence) override;
  void ask(uint64_t sequence, double after_s) override;

  /// Leaders: tells the other nodes why the communicator was aborted, if it was. Once.
  void tell_abort();
  /// Tells the other nodes why, if the communicator was aborted, and that this rank leaves. Does
  /// not wait. `idle`: no operation uses the wires.
  void close(bool idle);

 private:
  struct Departed {
    int number;
    uint64_t last;  // collective that it came to
  };

  std::vector<int> learn_numbers(const Exchange& exchange, const Network& network);
  void heard(const std::string& message);
  void lost(int node);
  void look_around();
  void tell_departures();
  void say_abort();

  Group& group_;
  const int node_;
  const std::vector<std::vector<int>> ranks_;
  int rails_;
  std::vector<std::string> hosts_;  // by node
  std::unique_ptr<Agreement> agreement_;
  std::unique_ptr<NetWire> leaders_, rail_, all_ranks_, device_rail_;
  bool takes_device_memory_ = true, device_rail_closed_ = false;
  std::function<std::unique_ptr<NetWire>(WireDevice&)> make_device_rail_;
  std::shared_ptr<Engine> engine_;

  std::mutex mutex_;  // of what follows
  std::vector<Departed> departed_;
  bool abort_told_ = false;
  std::vector<bool> departure_told_;  // by local rank
  std::atomic<bool> any_departed_{false};

  bool abort_said_ = false;             // the lifeline's thread's
  std::unique_ptr<Lifeline> lifeline_;  // last: its thread uses all of the above
};

}  // namespace ringreduce
