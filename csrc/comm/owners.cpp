#include "comm/owners.h"

#include "algorithms/hierarchical.h"
#include "algorithms/ring.h"

namespace ringreduce {
namespace {

void append(Runs& runs, size_t offset, const Runs& more) {
  for (const Run& run : more) runs.push_back({offset + run.offset, run.count, run.data});
}

/// The parts in two orders. By node, and there by local rank: a node's parts are one range, which
/// falls into one piece for each rail. By rail, and there by node: a rail's pieces are one range,
/// its shard.
class Crossing {
 public:
  Crossing(const Cluster& cluster, const Owners& owners, size_t item_bytes)
      : cluster_(cluster), owners_(owners), item_bytes_(item_bytes) {
    bool equal = true;
    for (const std::vector<int>& members : cluster.ranks()) {
      std::vector<size_t>& offsets = members_.emplace_back(1, end_);
      for (const int rank : members) {
        end_ += owners.parts[static_cast<size_t>(rank)].length;
        offsets.push_back(end_);
      }
      equal = equal && static_cast<int>(members.size()) == cluster.rails();
    }
    direct_ = equal && (owners.rails_own || cluster.rails() == 1);
    shards_.push_back(0);
    for (int rail = 0; rail < cluster.rails(); ++rail) {
      std::vector<size_t>& offsets = blocks_.emplace_back(1, shards_.back());
      for (int node = 0; node < cluster.nodes(); ++node) {
        offsets.push_back(offsets.back() + piece(node, rail).length);
      }
      shards_.push_back(offsets.back());
    }
    const auto local_size = cluster.ranks()[static_cast<size_t>(cluster.node())].size();
    shards_.resize(local_size + 1, end_);
    for (int local = 0; local <= static_cast<int>(local_size); ++local) {
      pieces_.push_back(local < cluster.rails() ? piece(cluster.node(), local).offset
                                                : members_of(cluster.node()).back());
    }
  }

  /// Whether a rail's pieces are its own ranks' parts.
  bool direct() const { return direct_; }
  Chunk all() const { return {0, end_}; }

  Runs by_node(const Runs& runs) const {
    Runs ordered;
    for (int node = 0; node < cluster_.nodes(); ++node) {
      const std::vector<int>& ranks = cluster_.ranks()[static_cast<size_t>(node)];
      for (size_t local = 0; local < ranks.size(); ++local) {
        const Chunk part = owners_.parts[static_cast<size_t>(ranks[local])];
        append(ordered, members_of(node)[local], slice(runs, part, item_bytes_));
      }
    }
    return ordered;
  }
  Runs by_rail(const Runs& runs) const {
    const Runs nodes = by_node(runs);
    Runs ordered;
    for (int rail = 0; rail < cluster_.rails(); ++rail) {
      for (int node = 0; node < cluster_.nodes(); ++node) {
        append(ordered, blocks_[static_cast<size_t>(rail)][static_cast<size_t>(node)],
               slice(nodes, piece(node, rail), item_bytes_));
      }
    }
    return ordered;
  }

  // By rail: what local ranks carry; what of a rail's shard belongs to which node.
  Blocks shards() const { return table(shards_); }
  Blocks blocks(int rail) const { return table(blocks_[static_cast<size_t>(rail)]); }
  // By node, of this one: what local ranks carry, and own.
  Blocks pieces() const { return table(pieces_); }
  Blocks members() const { return table(members_of(cluster_.node())); }

 private:
  static Blocks table(const std::vector<size_t>& offsets) {
    return Blocks::table(offsets.data(), static_cast<int>(offsets.size()) - 1);
  }
  const std::vector<size_t>& members_of(int node) const {
    return members_[static_cast<size_t>(node)];
  }
  Chunk piece(int node, int rail) const {
    const std::vector<size_t>& offsets = members_of(node);
    if (direct_) return table(offsets)[rail];
    const size_t begin = offsets.front(), count = offsets.back() - begin;
    const Chunk share =
        Blocks::first(cluster_.rails(), count, cluster_.rails(), block_granule)[rail];
    return {begin + share.offset, share.length};
  }

  const Cluster& cluster_;
  const Owners& owners_;
  const size_t item_bytes_;
  bool direct_ = false;
  size_t end_ = 0;
  std::vector<std::vector<size_t>> members_;  // of each node: where its ranks' parts begin, and end
  std::vector<std::vector<size_t>> blocks_;  // of each rail: where the nodes' pieces begin, and end
  std::vector<size_t> shards_, pieces_;      // where local ranks' begin, and the end
};

void reduce_at_once(Steps& steps, const Message& message, const Owners& owners) {
  Cluster& cluster = steps.cluster();
  const int local = steps.group().rank();
  const Crossing crossing(cluster, owners, message.item_bytes);
  Message across = message;
  across.inputs = crossing.by_rail(message.inputs);
  std::vector<char> sums, piece;
  if (steps.group().size() > 1) {
    steps.sum_inside(across, crossing.all(), crossing.shards(), sums);
    const Chunk mine = crossing.shards()[local];
    across.input_format = Format::partial;
    across.inputs = {{mine.offset, mine.length, sums.data()}};
  }
  const Chunk carried = crossing.pieces()[local];
  if (crossing.direct()) {
    across.outputs = crossing.by_rail(message.outputs);
  } else if (cluster.carries()) {
    piece.resize(carried.length * message.item_bytes);
    const Chunk block = crossing.blocks(local)[cluster.node()];
    across.outputs = {{block.offset, block.length, piece.data()}};
  }
  if (cluster.carries()) {
    steps.over(cluster.rail(), across, steps.watch(), [&](NetWire& wire, size_t chunk) {
      ring_reduce_scatter(wire, steps.ring_of_nodes(), crossing.blocks(local), chunk,
                          NetWire::lanes);
    });
  }
  if (crossing.direct()) return;
  Message inside = message;
  inside.inputs = {{carried.offset, carried.length, piece.data()}};
  inside.outputs = crossing.by_node(message.outputs);
  if (steps.group().size() > 1) inside.copy_across(carried);
  steps.staged(inside, Staged::Phases::allgather, crossing.pieces());
}

}  // namespace

/// In turns, each with a share of every part: so that no more memory than this is needed.
void reduce_to_owners(Steps& steps, const Message& message, const Owners& owners) {
  constexpr size_t turn_bytes = size_t{64} << 20;
  size_t count = 0;
  for (const Chunk& part : owners.parts) count += part.length;
  const size_t turns = (count * message.item_bytes + turn_bytes - 1) / turn_bytes;
  for (size_t turn = 0; turn < turns; ++turn) {
    Owners share = owners;
    for (Chunk& part : share.parts) part = part.piece(turn, (part.length + turns - 1) / turns);
    reduce_at_once(steps, message, share);
  }
}

void gather_from_owners(Steps& steps, const Message& message, const Owners& owners) {
  Cluster& cluster = steps.cluster();
  const int local = steps.group().rank();
  const Crossing crossing(cluster, owners, message.item_bytes);
  message.copy_across(owners.parts[static_cast<size_t>(steps.core().rank)]);
  Message gathered = message;
  if (!crossing.direct()) {
    gathered.outputs = crossing.by_node(message.outputs);
    steps.allgather_inside(gathered, crossing.members());
  }
  gathered.outputs = crossing.by_rail(message.outputs);
  if (cluster.carries()) {
    steps.over(cluster.rail(), gathered, steps.watch(), [&](NetWire& wire, size_t chunk) {
      ring_allgather(wire, steps.ring_of_nodes(), crossing.blocks(local), chunk, NetWire::lanes);
    });
  }
  const Blocks members = crossing.members();
  const bool has_all =
      !crossing.direct() &&
      members[members.size() - 1].end() - members[0].offset == crossing.all().length;
  if (!has_all) steps.allgather_inside(gathered, crossing.shards());
}

}  // namespace ringreduce
