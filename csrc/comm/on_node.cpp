#include "comm/on_node.h"

#include "algorithms/one_shot.h"
#include "algorithms/ring.h"
#include "algorithms/tree.h"
#include "algorithms/two_shot.h"
#include "comm/host_collective.h"
#include "shm/staged.h"

namespace ringreduce {
namespace {

class OnNode : private HostCollective {
 public:
  OnNode(Core& core, const Call& call, Work& work, const Interrupted& interrupted)
      : HostCollective(core, call, work, interrupted) {}

  void run() {
    if (core_.group.aborted()) throw_failure();
    core_.window.begin(header_, message_, watch_);
    if (call_.meets_only) {
      core_.window.arrive();
    } else {
      move();
    }
    if (core_.window.mismatch()) throw_mismatch(core_, all_headers());
    if (core_.window.stopped() || wire_stopped_) throw_failure();
    operands_.finish();
  }

 private:
  void barrier() override { core_.window.arrive(); }

  bool uses_ring() const {
    return core_.tuner.choose(call_.kind, 0) == Algorithm::ring && core_.size > 1;
  }
  Ring ring() const { return {core_.rank, core_.size}; }

  void allreduce() override {
    const size_t count = operands_.count();
    const Blocks blocks = Blocks::even(count, core_.size, block_granule);
    switch (core_.tuner.choose(Kind::allreduce, message_bytes())) {
      case Algorithm::one_shot:
        one_shot_allreduce(core_.window, count);
        break;
      case Algorithm::ring:
        if (!core_.window.arrive()) return;
        over_wire(
            [&](ShmWire& wire, size_t chunk) { ring_allreduce(wire, ring(), blocks, chunk); });
        break;
      case Algorithm::tree:
        if (!core_.window.arrive()) return;
        over_wire([&](ShmWire& wire, size_t chunk) {
          tree_allreduce(wire, core_.rank, core_.size, count, chunk);
        });
        break;
      default:
        two_shot(blocks);
    }
  }

  /// Symmetric where all ranks' tensors are; staged where any is not. Small messages are left to
  /// the last to arrive, if there is one: the others, who share its core, would only be woken to
  /// help.
  void two_shot(const Blocks& blocks) {
    publish_place();
    Staged staged(core_.window, Staged::Phases::allreduce, blocks);
    if (header_.segment == 0) staged.prepare_early();
    const bool one_does_all = core_.group.claims() && core_.tuner.small(message_bytes());
    const auto alone = [&] {
      const int symmetric = num_symmetric();
      if (symmetric == core_.size) {
        reach_symmetric();
        core_.window.reduce_alone(operands_.count());
      } else if (symmetric == 0 && staged.rounds() == 1) {
        staged.combine_alone();
      }
    };
    if (!core_.window.arrive(one_does_all ? std::function<void()>(alone) : nullptr)) return;
    const int symmetric = num_symmetric();
    if (symmetric == core_.size) {
      if (one_does_all) return;
      reach_symmetric();
      two_shot_allreduce(core_.window);
    } else {
      staged.met(symmetric == 0, one_does_all && symmetric == 0 && staged.rounds() == 1);
      run_staged(staged);
    }
  }

  int num_symmetric() const {
    int symmetric = 0;
    for (int peer = 0; peer < core_.size; ++peer) {
      symmetric += core_.window.header_of(peer).segment != 0;
    }
    return symmetric;
  }

  void publish_place() {
    if (call_.tensors.size() != 1 || message_.inputs.empty()) return;
    const Run& input = message_.inputs.front();
    const Run& output = message_.outputs.front();
    const size_t bytes = input.count * message_.item_bytes;
    const Arena::Place from = core_.arena->locate(input.data, bytes);
    const Arena::Place to = core_.arena->locate(output.data, bytes);
    if (from.segment == 0 || from.segment != to.segment || bytes == 0) return;
    header_.segment = from.segment;
    header_.input_offset = from.offset_bytes;
    header_.output_offset = to.offset_bytes;
  }

  void reach_symmetric() {
    const size_t bytes = message_bytes();
    for (int peer = 0; peer < core_.size; ++peer) {
      const Header header = core_.window.header_of(peer);
      const char* input = core_.arena->at(peer, {header.segment, header.input_offset}, bytes);
      char* output = core_.arena->at(peer, {header.segment, header.output_offset}, bytes);
      if (!input || !output) {
        core_.group.abort(
            ErrorCode::peer_failed, peer,
            "rank " + std::to_string(peer) + " published memory outside of its segment");
        throw_failure();
      }
      core_.window.set_symmetric(peer, input, output);
    }
    core_.window.begin_symmetric(operands_.count());
  }

  void run_staged(Staged& staged) {
    staged_rounds(staged, staged.rounds(), staged.lead());
    staged.finish();
  }

  template <class Algorithm>
  void over_wire(Algorithm algorithm) {
    ShmWire& wire = *core_.wire;
    wire.begin(message_, watch_);
    algorithm(wire, wire.chunk_elements());
    wire_stopped_ = wire.stopped();
  }

  void scatter(const Blocks& blocks) {
    Staged staged(core_.window, Staged::Phases::reduce_scatter, blocks);
    if (!uses_ring()) staged.prepare_early();
    if (!core_.window.arrive()) return;
    if (uses_ring()) {
      over_wire(
          [&](ShmWire& wire, size_t chunk) { ring_reduce_scatter(wire, ring(), blocks, chunk); });
    } else {
      staged.met(true, false);
      run_staged(staged);
    }
  }

  /// After the ranks have met.
  void gather(const Blocks& blocks) {
    message_.copy_across(blocks[core_.rank]);
    if (uses_ring()) {
      over_wire([&](ShmWire& wire, size_t chunk) { ring_allgather(wire, ring(), blocks, chunk); });
    } else {
      Staged staged(core_.window, Staged::Phases::allgather, blocks);
      run_staged(staged);
    }
  }

  void reduce_scatter() override {
    const std::vector<size_t> offsets = operands_.scatter_rows(core_.rank, core_.size);
    scatter(Blocks::table(offsets.data(), core_.size));
  }

  void reduce_to_root() override {
    scatter(Blocks::single(operands_.count(), core_.size, call_.root));
  }

  void broadcast() override {
    if (core_.window.arrive()) gather(Blocks::single(operands_.count(), core_.size, call_.root));
  }

  void allgather() override {
    if (!core_.window.arrive()) return;
    const std::vector<size_t> offsets = place_result(all_headers());
    gather(Blocks::table(offsets.data(), core_.size));
  }

  std::vector<Header> all_headers() const {
    std::vector<Header> headers;
    for (int peer = 0; peer < core_.size; ++peer) headers.push_back(core_.window.header_of(peer));
    return headers;
  }

  bool wire_stopped_ = false;
};

}  // namespace

void run_on_node(Core& core, const Call& call, Work& work, const Interrupted& interrupted) {
  OnNode(core, call, work, interrupted).run();
}

}  // namespace ringreduce
