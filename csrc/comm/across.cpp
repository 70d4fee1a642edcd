#include "comm/across.h"

#include <algorithm>
#include <cstring>

#include "algorithms/doubling.h"
#include "algorithms/hierarchical.h"
#include "algorithms/ring.h"
#include "algorithms/tree.h"
#include "comm/host_collective.h"
#include "comm/owners.h"
#include "comm/steps.h"

namespace ringreduce {
namespace {

class AcrossNodes : private HostCollective {
 public:
  AcrossNodes(Core& core, const Call& call, Work& work, const Interrupted& interrupted)
      : HostCollective(core, call, work, interrupted),
        cluster_(*core.cluster),
        interrupted_(interrupted),
        steps_(core, header_, watch_),
        partial_bytes_(partial_size_of(call.dtype)) {}

  void run() {
    if (core_.group.aborted()) throw_failure();
    if (call_.kind == Kind::reduce_scatter)
      scattered_ = operands_.scatter_rows(core_.rank, core_.size);
    const bool sums = call_.kind == Kind::allreduce || call_.kind == Kind::reduce_scatter ||
                      call_.kind == Kind::reduce;
    const bool small = sums && !call_.meets_only && !core_.tuner.needs_wire() &&
                       operands_.count() * partial_bytes_ <= Agreement::largest_payload_bytes;
    core_.window.begin(header_, message_, watch_);
    if (small && !alone()) core_.window.share_input({0, operands_.count()});
    core_.window.arrive();
    if (core_.window.stopped()) throw_failure();
    if (!meet(small ? operands_.count() : 0)) throw_mismatch(core_, all_headers());
    const bool moves = operands_.count() > 0 || call_.kind == Kind::allgather;
    if (moves && !small && !call_.meets_only) move();
    operands_.finish();
  }

 private:
  // ---- The meeting.

  /// Leaders agree for their nodes; others wait for their leader. False: the ranks differ. The sum
  /// of the first `count` elements that were shared in each node comes with it.
  bool meet(size_t count) {
    GroupControl& shared = core_.group.shared();
    if (cluster_.leads()) {
      const bool agreed = agree(count);
      shared.nodes_differ.store(!agreed, std::memory_order_relaxed);
      shared.nodes_met.publish(header_.sequence);
    } else if (!wait(shared.nodes_met, header_.sequence, core_.group.patience(), watch_)) {
      throw_failure();
    }
    if (shared.nodes_differ.load(std::memory_order_relaxed) != 0) return false;
    if (count > 0 && !alone()) {
      const size_t bytes = count * message_.item_bytes;
      message_.copy_out({0, count}, core_.window.share(0, bytes));
      core_.window.end_share(bytes);
    }
    return true;
  }

  bool agree(size_t count) {
    const Reduction local = unfinished(message_.reduction);
    alignas(64) char sum[Agreement::largest_payload_bytes];
    const bool differs = core_.window.mismatch();
    if (count > 0 && !differs) add_up(local, count, sum);
    const Agreement::Verdict verdict =
        cluster_.agreement().meet(header_.digest(), differs, {local, sum, count}, watch_);
    if (verdict == Agreement::Verdict::stopped) throw_failure();
    if (verdict == Agreement::Verdict::differ) return false;
    if (alone()) {
      message_.for_each_run(message_.outputs, {0, count}, [&](char* output, Chunk part) {
        finish(sum + part.offset * partial_bytes_, output, part.length);
      });
    } else if (count > 0) {
      // The leader's own input has been read, and nobody else looks there before nodes_met.
      finish(sum, core_.window.share(0, count * message_.item_bytes), count);
    }
    return true;
  }

  /// A leader with nobody to lead: its tensors are read and written where they are.
  bool alone() const { return core_.group.size() == 1; }

  /// This node's partial values.
  void add_up(const Reduction& local, size_t count, char* sum) {
    if (!alone()) return core_.window.reduce_shares(local, count, {sum, Format::partial});
    message_.for_each_run(message_.inputs, {0, count}, [&](const char* input, Chunk part) {
      const Target target{sum + part.offset * partial_bytes_, Format::partial};
      const Source source{input, Format::storage};
      reduce(local, {&target, 1}, {&source, 1}, part.length);
    });
  }

  void finish(const char* sum, char* result, size_t count) const {
    const Target target{result, Format::storage};
    const Source source{sum, Format::partial};
    reduce(message_.reduction, {&target, 1}, {&source, 1}, count);
  }

  /// Of all ranks of the communicator, in their order.
  std::vector<Header> all_headers() {
    const auto& nodes = cluster_.ranks();
    std::vector<size_t> offsets{0};
    for (const auto& members : nodes) {
      offsets.push_back(offsets.back() + members.size() * sizeof(Header));
    }
    std::vector<char> bytes(offsets.back());
    for (int local = 0; local < core_.group.size(); ++local) {
      const Header header = core_.window.header_of(local);
      const size_t at = offsets[static_cast<size_t>(cluster_.node())] +
                        static_cast<size_t>(local) * sizeof(Header);
      std::memcpy(&bytes[at], &header, sizeof(Header));
    }
    Message message{{Dtype::u8, Op::sum, 1}, 1, {{0, bytes.size(), bytes.data()}}, {}};
    message.outputs = message.inputs;
    gather_leaders(message, Blocks::table(offsets.data(), cluster_.nodes()));
    std::vector<Header> headers(static_cast<size_t>(core_.size));
    const char* from = bytes.data();
    for (const auto& members : nodes) {
      for (const int rank : members) {
        std::memcpy(&headers[static_cast<size_t>(rank)], from, sizeof(Header));
        from += sizeof(Header);
      }
    }
    return headers;
  }

  /// The leaders' blocks go to all leaders, and then to all ranks.
  void gather_leaders(const Message& message, const Blocks& blocks) {
    if (cluster_.leads()) {
      steps_.over(cluster_.leaders(), message, watch_, [&](NetWire& wire, size_t chunk) {
        ring_allgather(wire, steps_.ring_of_nodes(), blocks, chunk);
      });
    }
    steps_.allgather_inside(message, Blocks::single(blocks.count(), core_.group.size(), 0));
  }

  // ---- The collectives.

  void barrier() override {}  // they have met

  void allreduce() override {
    if (core_.tuner.needs_wire()) {
      const Algorithm wanted = core_.tuner.choose(Kind::allreduce, message_bytes());
      const AcrossChoice choice{wanted == Algorithm::tree ? Across::tree : Across::ring,
                                NetWire::slot_bytes / partial_bytes_};
      reduce_over(cluster_.all_ranks(), core_.rank, core_.size, choice, message_, operands_.count(),
                  watch_);
    } else {
      hierarchical(message_, operands_.count());
    }
  }

  void reduce_over(NetWire& wire, int rank, int size, AcrossChoice choice, const Message& message,
                   size_t count, Watch& watch) {
    steps_.over(wire, message, watch, [&](NetWire& over, size_t) {
      switch (choice.algorithm) {
        case Across::doubling:
          doubling_allreduce(over, rank, size, count, choice.chunk);
          break;
        case Across::tree:
          tree_allreduce(over, rank, size, count, choice.chunk);
          break;
        case Across::ring:
          ring_allreduce(over, Ring{rank, size}, Blocks::even(count, size, block_granule),
                         choice.chunk, NetWire::lanes);
      }
    });
  }

  void hierarchical(const Message& message, size_t count) {
    const NodesChoice choice = core_.tuner.across(count, cluster_.shape(), call_.dtype);
    const Rails rails{cluster_.rails(), count, choice.segment, block_granule};
    Segments segments(*this, message, rails, choice.across);
    hierarchical_allreduce(segments, rails.segments(), rails.segments() > 1 ? 1 : 0);
  }

  /// The phases of hierarchical.h. With several segments, what goes across runs on the cluster's
  /// engine meanwhile.
  class Segments {
   public:
    Segments(AcrossNodes& across, const Message& message, const Rails& rails, AcrossChoice choice)
        : across_(across), message_(message), rails_(rails), choice_(choice) {}

    /// What runs in the background uses this object, and ends when the communicator has.
    ~Segments() {
      for (const Shard& shard : shards_) {
        if (!shard.work || shard.work->done()) continue;
        across_.core_.group.abort(
            ErrorCode::peer_failed, across_.core_.rank,
            "rank " + std::to_string(across_.core_.rank) + " failed during a collective");
        shard.work->wait(Deadline::never(), {});
      }
    }

    void reduce_scatter(size_t segment) {
      Shard& shard = shard_of(segment);
      const Chunk mine = chunk_of(segment);
      shard.message = message_;
      shard.message.outputs = slice(message_.outputs, mine, message_.item_bytes);
      if (local_size() == 1) {
        shard.message.inputs = slice(message_.inputs, mine, message_.item_bytes);
      } else if (across_.partial_bytes_ == message_.item_bytes) {
        Message inside = message_;
        inside.reduction = unfinished(message_.reduction);
        across_.steps_.staged(inside, Staged::Phases::reduce_scatter, blocks(segment));
        shard.message.inputs = shard.message.outputs;
      } else {
        across_.steps_.sum_inside(message_, rails_.whole(segment), blocks(segment), shard.sums);
        shard.message.input_format = Format::partial;
        shard.message.inputs = {{0, mine.length, shard.sums.data()}};
      }
    }

    void start(size_t segment) {
      Shard& shard = shard_of(segment);
      const size_t count = chunk_of(segment).length;
      if (count == 0) return;
      const auto run = [this, &shard, count](Watch& watch) {
        Cluster& cluster = across_.cluster_;
        across_.reduce_over(cluster.rail(), cluster.node(), cluster.nodes(), choice_, shard.message,
                            count, watch);
      };
      if (rails_.segments() == 1) return run(across_.watch_);
      const auto in_background = [this, run](Work&) {
        const Interrupted never;
        GroupWatch watch = across_.core_.watch(across_.header_, never);
        run(watch);
      };
      shard.work = across_.cluster_.engine().enqueue(in_background, false);
    }

    void finish(size_t segment) {
      Shard& shard = shard_of(segment);
      if (!shard.work) return;
      across_.await(*shard.work);
      shard.work->get();
      shard.work.reset();
    }

    void allgather(size_t segment) {
      if (local_size() > 1) across_.steps_.allgather_inside(message_, blocks(segment));
    }

   private:
    /// Of a segment under way: two are at once.
    struct Shard {
      Message message;         // from element 0 of the shard
      std::vector<char> sums;  // 16-bit floats: this node's, as float32
      std::shared_ptr<Work> work;
    };
    Shard& shard_of(size_t segment) { return shards_[segment % 2]; }
    int local_size() const { return across_.core_.group.size(); }

    /// What this rank carries; empty if it is on no rail.
    Chunk chunk_of(size_t segment) const {
      if (!across_.cluster_.carries()) return {};
      return rails_.shard(segment, across_.core_.group.rank());
    }

    /// Who has what of a segment inside the node.
    Blocks blocks(size_t segment) {
      offsets_.clear();
      for (int local = 0; local <= local_size(); ++local) {
        offsets_.push_back(local < rails_.rails ? rails_.shard(segment, local).offset
                                                : rails_.whole(segment).end());
      }
      return Blocks::table(offsets_.data(), local_size());
    }

    AcrossNodes& across_;
    const Message& message_;
    const Rails rails_;
    const AcrossChoice choice_;
    std::vector<size_t> offsets_;
    Shard shards_[2];
  };

  /// Until what runs in the background has ended, well or not.
  void await(Work& work) {
    if (work.wait(Deadline::never(), interrupted_) == Work::Outcome::finished) return;
    core_.group.abort_interrupted();
    work.wait(Deadline::never(), {});
  }

  /// In pieces, each of which all ranks sum up; a rank keeps what is its own. Twice the least that
  /// has to cross the network, and no more memory than a piece.
  void reduce_to_outputs() {
    constexpr size_t piece_bytes = size_t{64} << 20;
    const size_t piece = piece_bytes / message_.item_bytes;
    std::vector<char> scratch(std::min(piece, operands_.count()) * message_.item_bytes);
    for (size_t index = 0;; ++index) {
      const Chunk chunk = Chunk{0, operands_.count()}.piece(index, piece);
      if (chunk.empty()) return;
      Message part = message_;
      part.inputs = slice(message_.inputs, chunk, message_.item_bytes);
      part.outputs = {{0, chunk.length, scratch.data()}};
      hierarchical(part, chunk.length);
      message_.for_each_run(message_.outputs, chunk, [&](char* output, Chunk mine) {
        std::memcpy(output, &scratch[(mine.offset - chunk.offset) * message_.item_bytes],
                    mine.length * message_.item_bytes);
      });
    }
  }

  /// A ring has the least traffic, but a step for each node: with many, a message of medium size
  /// is sooner everywhere.
  void reduce_to(const Owners& owners) {
    const auto nodes = static_cast<double>(cluster_.nodes());
    const auto rails = static_cast<size_t>(cluster_.rails());
    const size_t shard = (operands_.count() + rails - 1) / rails;
    const Link link = core_.tuner.rail(cluster_.rails());
    const NodesChoice choice = core_.tuner.across(operands_.count(), cluster_.shape(), call_.dtype);
    const double part = owners.rails_own ? (nodes - 1) / nodes : 1;
    const double ring_s = (nodes - 1) * link.alpha_s +
                          part * static_cast<double>(shard * partial_bytes_) * link.beta_s_per_byte;
    const double allreduce_s =
        across_time_s(choice.across, shard, cluster_.nodes(), link, call_.dtype);
    if (ring_s <= allreduce_s) {
      reduce_to_owners(steps_, message_, owners);
    } else {
      reduce_to_outputs();
    }
  }

  void reduce_scatter() override {
    Owners owners{{}, true};
    for (size_t rank = 0; rank + 1 < scattered_.size(); ++rank) {
      owners.parts.push_back({scattered_[rank], scattered_[rank + 1] - scattered_[rank]});
    }
    reduce_to(owners);
  }

  /// All belongs to the root.
  Owners of_root() const {
    Owners owners{std::vector<Chunk>(static_cast<size_t>(core_.size)), false};
    owners.parts[static_cast<size_t>(call_.root)] = {0, operands_.count()};
    return owners;
  }

  void reduce_to_root() override { reduce_to(of_root()); }

  void broadcast() override { gather_from_owners(steps_, message_, of_root()); }

  void allgather() override {
    const std::vector<size_t> places = place_result(all_headers());
    Owners owners{{}, true};
    for (size_t rank = 0; rank + 1 < places.size(); ++rank) {
      owners.parts.push_back({places[rank], places[rank + 1] - places[rank]});
    }
    gather_from_owners(steps_, message_, owners);
  }

  Cluster& cluster_;
  const Interrupted& interrupted_;
  Steps steps_;
  const size_t partial_bytes_;
  std::vector<size_t> scattered_;  // reduce_scatter: where each rank's rows begin, and the end
};

}  // namespace

void run_across(Core& core, const Call& call, Work& work, const Interrupted& interrupted) {
  try {
    AcrossNodes(core, call, work, interrupted).run();
  } catch (const Error& error) {
    // MPI refused something: the others cannot know.
    if (error.code() == ErrorCode::resource) core.abort_failed(error);
    throw;
  }
}

}  // namespace ringreduce
