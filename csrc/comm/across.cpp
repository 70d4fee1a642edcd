#include "comm/across.h"

#include <algorithm>
#include <cstring>

#include "algorithms/doubling.h"
#include "algorithms/hierarchical.h"
#include "algorithms/ring.h"
#include "algorithms/tree.h"
#include "algorithms/two_shot.h"
#include "comm/collective.h"
#include "shm/staged.h"

namespace ringreduce {
namespace {

constexpr size_t block_granule = line_bytes;  // no two ranks write to the same cache line

class AcrossNodes {
 public:
  AcrossNodes(Core& core, const Call& call, Work& work, const Interrupted& interrupted)
      : core_(core),
        cluster_(*core.cluster),
        call_(call),
        work_(work),
        operands_(call),
        message_(operands_.message()),
        header_(call.header(core.sequence.fetch_add(1) + 1)),
        limits_{core.options.warn_after_s, core.options.timeout_s},
        interrupted_(interrupted),
        watch_(core.group, header_, limits_, interrupted, core.closing),
        partial_bytes_(partial_size_of(call.dtype)) {
    message_.reduction.size = core.size;
  }

  void run() {
    if (core_.group.aborted()) throw_failure();
    const bool small = call_.kind == Kind::allreduce && !call_.meets_only &&
                       !core_.tuner.needs_wire() &&
                       operands_.count() * partial_bytes_ <= Agreement::largest_payload_bytes;
    core_.window.begin(header_, message_, watch_);
    if (small) core_.window.share_input({0, operands_.count()});
    core_.window.arrive();
    if (core_.window.stopped()) throw_failure();
    if (!meet(small ? operands_.count() : 0)) throw_mismatch(core_, all_headers());
    if (!small && !call_.meets_only) move();
    operands_.finish();
  }

 private:
  void move() {
    if (operands_.count() == 0 && call_.kind != Kind::allgather) return;
    switch (call_.kind) {
      case Kind::barrier:
      case Kind::allocate:
        break;
      case Kind::allreduce:
        allreduce();
        break;
      case Kind::reduce_scatter:
        reduce_scatter();
        break;
      case Kind::allgather:
        allgather();
        break;
      case Kind::broadcast:
        broadcast();
        break;
      case Kind::reduce:
        reduce_to_root();
        break;
    }
  }

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
    if (count > 0) {
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
    if (count > 0 && !differs) core_.window.reduce_shares(local, count, {sum, Format::partial});
    const Agreement::Verdict verdict =
        cluster_.agreement().meet(header_.digest(), differs, {local, sum, count}, watch_);
    if (verdict == Agreement::Verdict::stopped) throw_failure();
    if (verdict == Agreement::Verdict::differ) return false;
    if (count > 0) {
      // The leader's own input has been read, and nobody else looks there before nodes_met.
      const Target target{core_.window.share(0, count * message_.item_bytes), Format::storage};
      const Source source{sum, Format::partial};
      reduce(message_.reduction, {&target, 1}, {&source, 1}, count);
    }
    return true;
  }

  /// Partial sums go on: avg divides once, at the end.
  static Reduction unfinished(Reduction reduction) {
    if (reduction.op == Op::avg) reduction.op = Op::sum;
    return reduction;
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

  // ---- Steps of which collectives are made. They throw if the communicator is aborted.

  Ring ring_of_nodes() const { return {cluster_.node(), cluster_.nodes()}; }

  /// Block l of the node's sum ends in local rank l's outputs.
  void reduce_scatter_inside(const Message& message, const Blocks& blocks) {
    staged(message, Staged::Phases::reduce_scatter, blocks);
  }

  /// Block l of local rank l's outputs goes to the outputs of all ranks of the node.
  void allgather_inside(const Message& message, const Blocks& blocks) {
    Message gathered = message;
    gathered.inputs = message.outputs;
    staged(gathered, Staged::Phases::allgather, blocks);
  }

  void staged(const Message& message, Staged::Phases phases, const Blocks& blocks) {
    if (core_.group.size() == 1) {
      message.copy_across({0, blocks.count()});
      return;
    }
    core_.window.begin(header_, message, watch_);
    Staged rounds(core_.window, phases, blocks);
    staged_rounds(rounds, rounds.rounds(), rounds.lead());
    rounds.finish();
    if (core_.window.stopped()) throw_failure();
  }

  /// algorithm(wire, chunk) over the nodes. Any thread, with a watch of its own.
  template <class Algorithm>
  void over(NetWire& wire, const Message& message, Watch& watch, Algorithm algorithm) {
    wire.begin(message, watch);
    algorithm(wire, wire.chunk_elements());
    if (!wire.end()) throw_failure();
  }

  /// The leaders' blocks go to all leaders, and then to all ranks.
  void gather_leaders(const Message& message, const Blocks& blocks) {
    if (cluster_.leads()) {
      over(cluster_.leaders(), message, watch_, [&](NetWire& wire, size_t chunk) {
        ring_allgather(wire, ring_of_nodes(), blocks, chunk);
      });
    }
    allgather_inside(message, Blocks::single(blocks.count(), core_.group.size(), 0));
  }

  // ---- The collectives.

  size_t message_bytes() const { return operands_.count() * message_.item_bytes; }

  void allreduce() {
    if (core_.tuner.needs_wire()) {
      const Algorithm wanted = core_.tuner.choose(Kind::allreduce, message_bytes()).algorithm;
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
    over(wire, message, watch, [&](NetWire& over, size_t) {
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
        across_.staged(inside, Staged::Phases::reduce_scatter, blocks(segment));
        shard.message.inputs = shard.message.outputs;
      } else {
        reduce_widened(shard, segment);
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
        GroupWatch watch(across_.core_.group, across_.header_, across_.limits_, never,
                         across_.core_.closing);
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
      if (local_size() > 1) across_.allgather_inside(message_, blocks(segment));
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

    /// 16-bit floats are added as float32, from here to the end of the sum.
    void reduce_widened(Shard& shard, size_t segment) {
      const Chunk whole = rails_.whole(segment), mine = chunk_of(segment);
      const size_t partial_bytes = across_.partial_bytes_;
      Message inside;
      inside.reduction = unfinished(message_.reduction);
      widened_.resize(whole.length * partial_bytes);
      message_.for_each_run(message_.inputs, whole, [&](const char* from, Chunk part) {
        const Target to{&widened_[(part.offset - whole.offset) * partial_bytes], Format::partial};
        const Source source{from, Format::storage};
        reduce(inside.reduction, {&to, 1}, {&source, 1}, part.length);
      });
      shard.sums.resize(mine.length * partial_bytes);
      inside.reduction.dtype = Dtype::f32;
      inside.item_bytes = partial_bytes;
      inside.inputs = {{whole.offset, whole.length, widened_.data()}};
      inside.outputs = {{mine.offset, mine.length, shard.sums.data()}};
      across_.staged(inside, Staged::Phases::reduce_scatter, blocks(segment));
      shard.message.input_format = Format::partial;
      shard.message.inputs = {{0, mine.length, shard.sums.data()}};
    }

    AcrossNodes& across_;
    const Message& message_;
    const Rails rails_;
    const AcrossChoice choice_;
    std::vector<size_t> offsets_;
    std::vector<char> widened_;
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

  void reduce_scatter() {
    operands_.scatter_rows(core_.rank, core_.size);
    reduce_to_outputs();
  }

  void reduce_to_root() { reduce_to_outputs(); }

  /// To the ranks of root's node; along the nodes, each rail a shard; to the ranks of the others.
  void broadcast() {
    int root_node = 0, root_place = 0;
    for (int node = 0; node < cluster_.nodes(); ++node) {
      const std::vector<int>& members = cluster_.ranks()[static_cast<size_t>(node)];
      const auto place = std::find(members.begin(), members.end(), call_.root);
      if (place == members.end()) continue;
      root_node = node;
      root_place = static_cast<int>(place - members.begin());
    }
    const bool at_root = cluster_.node() == root_node;
    if (at_root) {
      allgather_inside(message_, Blocks::single(operands_.count(), core_.group.size(), root_place));
    }
    const size_t count = operands_.count();
    const Rails rails{cluster_.rails(), count, count, block_granule};
    if (cluster_.carries()) {
      const Chunk shard = rails.shard(0, core_.group.rank());
      Message mine = message_;
      mine.outputs = slice(message_.outputs, shard, message_.item_bytes);
      const Blocks blocks = Blocks::single(shard.length, cluster_.nodes(), root_node);
      over(cluster_.rail(), mine, watch_, [&](NetWire& wire, size_t chunk) {
        ring_allgather(wire, ring_of_nodes(), blocks, chunk);
      });
    }
    if (!at_root) {
      allgather_inside(message_, rails.shards(0, core_.group.size()));
    }
  }

  /// The parts lie in the message node after node; so a node's ranks, and then its leader, have one
  /// block. In the output each lies where its rank's number puts it.
  void allgather() {
    for (const Header& header : all_headers()) work_.counts.push_back(header.rows);
    const std::vector<size_t> places = allocate_output(work_, header_.count, message_.item_bytes);
    std::vector<size_t> nodes{0}, members{};
    message_.outputs.clear();
    size_t offset = 0;
    for (int node = 0; node < cluster_.nodes(); ++node) {
      for (const int rank : cluster_.ranks()[static_cast<size_t>(node)]) {
        const auto index = static_cast<size_t>(rank);
        const size_t length = places[index + 1] - places[index];
        if (rank == core_.rank) operands_.place_inputs_at(offset);
        if (node == cluster_.node()) members.push_back(offset);
        message_.outputs.push_back(
            {offset, length, work_.output.get() + places[index] * message_.item_bytes});
        offset += length;
      }
      if (node == cluster_.node()) members.push_back(offset);
      nodes.push_back(offset);
    }
    message_.copy_across({0, offset});
    allgather_inside(message_, Blocks::table(members.data(), core_.group.size()));
    gather_leaders(message_, Blocks::table(nodes.data(), cluster_.nodes()));
  }

  [[noreturn]] void throw_failure() const {
    throw_aborted(core_, header_.describe() + " #" + std::to_string(header_.sequence));
  }

  Core& core_;
  Cluster& cluster_;
  const Call& call_;
  Work& work_;
  Operands operands_;
  Message& message_;
  Header header_;
  const GroupWatch::Limits limits_;
  const Interrupted& interrupted_;
  GroupWatch watch_;
  const size_t partial_bytes_;
};

}  // namespace

void run_across(Core& core, const Call& call, Work& work, const Interrupted& interrupted) {
  try {
    AcrossNodes(core, call, work, interrupted).run();
  } catch (const Error& error) {
    // MPI refused something: the others cannot know.
    if (error.code() == ErrorCode::resource) {
      core.group.abort(ErrorCode::peer_failed, core.rank,
                       "rank " + std::to_string(core.rank) + " failed: " + error.what());
    }
    throw;
  }
}

}  // namespace ringreduce
