// A collective on host memory, as it is on one node (on_node.cpp) and on several (across.cpp): its
// operands, its header, what its waits look at, and a function for each kind.
#pragma once

#include <new>
#include <vector>

#include "comm/collective.h"

namespace ringreduce {

/// Derived classes have run(): from the meeting of the ranks to the result.
class HostCollective {
 protected:
  /// Takes the communicator's next number. All arguments outlive it.
  HostCollective(Core& core, const Call& call, Work& work, const Interrupted& interrupted)
      : core_(core),
        call_(call),
        work_(work),
        operands_(call),
        message_(operands_.message()),
        header_(call.header(core.sequence.fetch_add(1) + 1)),
        watch_(core.watch(header_, interrupted)) {
    message_.reduction.size = core.size;
  }
  ~HostCollective() = default;

  /// What the call's kind does.
  void move() {
    switch (call_.kind) {
      case Kind::barrier:
      case Kind::allocate:
        return barrier();
      case Kind::allreduce:
        return allreduce();
      case Kind::reduce_scatter:
        return reduce_scatter();
      case Kind::allgather:
        return allgather();
      case Kind::broadcast:
        return broadcast();
      case Kind::reduce:
        return reduce_to_root();
    }
  }
  virtual void barrier() = 0;
  virtual void allreduce() = 0;
  virtual void reduce_scatter() = 0;
  virtual void allgather() = 0;
  virtual void broadcast() = 0;
  virtual void reduce_to_root() = 0;

  size_t message_bytes() const { return operands_.count() * message_.item_bytes; }

  /// Allocates an allgather's result, by what all ranks' headers say, and places the operands in
  /// it. Returns where each rank's part begins, in elements, and the end.
  std::vector<size_t> place_result(const std::vector<Header>& headers) {
    // What peers say of their sizes is checked against this, so that no product or sum wraps.
    constexpr size_t largest_result_bytes = size_t{1} << 46;
    std::vector<size_t> offsets{0};
    for (const Header& header : headers) {
      if (header_.count > 0 && header.rows > largest_result_bytes / header_.count) {
        throw std::bad_alloc();
      }
      work_.counts.push_back(header.rows);
      offsets.push_back(offsets.back() + header.rows * header_.count);
    }
    work_.output_bytes = offsets.back() * message_.item_bytes;
    if (work_.output_bytes > largest_result_bytes) throw std::bad_alloc();
    work_.output.reset(new char[work_.output_bytes]);
    operands_.place_inputs_at(offsets[static_cast<size_t>(core_.rank)]);
    operands_.set_output(work_.output.get(), offsets.back());
    return offsets;
  }

  [[noreturn]] void throw_failure() const { throw_aborted(core_, header_); }

  Core& core_;
  const Call& call_;
  Work& work_;
  Operands operands_;
  Message& message_;
  Header header_;
  GroupWatch watch_;
};

}  // namespace ringreduce
