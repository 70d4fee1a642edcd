// The control connection between nodes: TCP along a binary tree of their leaders, open for the life
// of a communicator and apart from its data. What one node floods, all others hear at once; and the
// kernel's keepalive finds out within about two seconds that a host is gone or a network is cut,
// also while no rank is in a call. One thread per leader, asleep but for a look around every 20 ms.
//
// A node that has said goodbye hears nothing more, but passes on what others tell until they have
// said goodbye, too, or its process ends.
//
// A leader that is killed cuts the tree into parts, and is missed in each: all its neighbours see
// their connection end, and each tells its own part. Later news do not cross from part to part, and
// need not: the communicator is dead on all nodes by then. What is not told and ends by the
// deadline only: what happens behind a leader that is stopped, which relays nothing; and a death
// during the last collective of a leader that had said goodbye, and whose process has ended, too
// (MPI_Finalize keeps it until all ranks are there).
//
// Who connects must show a random token that only ranks of this communicator were given; nothing
// listens once all are connected.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "base/exchange.h"

namespace ringreduce {

class Lifeline {
 public:
  /// Called from the lifeline's thread.
  struct Events {
    std::function<void(const std::string& message)> heard;
    /// Its leader's connection ended without a goodbye. Called on all nodes.
    std::function<void(int node)> lost;
    std::function<void()> look_around;
  };

  /// Collective over all ranks of the communicator; `leads`: whether this one is its node's leader.
  Lifeline(int node, int nodes, bool leads, const Exchange& exchange, Events events,
           Deadline deadline);
  ~Lifeline();

  /// Leaders only: events come from now on. `alarms`: descriptors, each of which becomes readable
  /// when it is time to look around, once. Closed here.
  void start(std::vector<int> alarms);
  /// Leaders only. Sends to all other nodes, in the background. Any thread.
  void flood(const std::string& message);
  /// Says goodbye: the end of this connection is no failure. Does not wait, but for an event that
  /// is under way; none comes after it has returned. Idempotent.
  void close();

 private:
  struct State;
  std::shared_ptr<State> state_;  // shared with the thread, which may outlive this object briefly
};

}  // namespace ringreduce
