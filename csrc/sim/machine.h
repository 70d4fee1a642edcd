// What a simulated machine is like, and what is counted on it. The time model, for wires and
// windows alike:
//
//   A message of n bytes takes alpha + n * beta from its sender to its receiver. It starts when its
//   data are there, a slot of the FIFO is free, the FIFO's last message has arrived (a link carries
//   one at a time), and the sender's port is free; the port is busy for n * beta, as all messages
//   of a rank share it. A slot is free again as soon as the receiver has used its contents. Adding
//   n bytes that a message brought takes n * sum_s_per_byte of the receiver, none by default. Over
//   a window, a rank moves n bytes from or to other ranks' memory in n * beta, its own in none, and
//   learns alpha later what another rank has published.
//
// With alpha = 1 and beta = 0 the time of a collective is thus the number of messages on its
// longest chain.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "algorithms/cost.h"
#include "sim/fibers.h"

namespace ringreduce::sim {

struct Machine {
  Link link{1, 0};
  size_t slots = 2;     // per FIFO
  bool claims = false;  // over a window: slices fall to whoever comes first, else to their owners
  Order order = Order::by_time;
  /// A rank starts, and goes on before each of its steps, up to this much later than it could.
  double max_delay_s = 0;
  uint64_t seed = 0;  // of the delays and of the order
  double sum_s_per_byte = 0;
};

/// Of one rank.
struct Counts {
  size_t primitives = 0;  // that moved anything
  size_t messages = 0;    // sent; none over a window
  size_t bytes_sent = 0;  // over a window: stored to other ranks' memory
  size_t bytes_received = 0;
  double finish_s = 0;  // when its last step ended
};

/// The delays of one rank. They come from its own generator, so no order of events changes them.
class Delays {
 public:
  Delays(const Machine& machine, int rank)
      : random_(machine.seed * 1000003 + static_cast<uint64_t>(rank)), most_(machine.max_delay_s) {}
  double next() { return most_ * random_.unit(); }

 private:
  Random random_;
  double most_;
};

}  // namespace ringreduce::sim
