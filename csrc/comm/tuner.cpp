#include "comm/tuner.h"

#include <algorithm>

#include "base/error.h"
#include "comm/accelerator.h"
#include "comm/collective.h"
#include "cuda/kernels.h"
#include "net/agreement.h"
#include "net/wire.h"
#include "shm/wire.h"

namespace ringreduce {
namespace {

// What the shared memory of one_shot takes, whoever asks for more; larger messages go by two_shot.
constexpr size_t one_shot_largest_bytes = size_t{64} << 10;

// Up to here a rank is done before others, which share its core, have woken up.
constexpr size_t small_bytes = size_t{32} << 10;

// A kernel, or a copy between the device and the host, and the wait for it; and what PCIe 4.0 x16
// carries. Derived, not measured.
constexpr double launch_s = 10e-6;
constexpr double copied_bytes_per_s = 25e9;

}  // namespace

void Constants::replace(const Measured& measured) {
  for (const auto& [name, value] : measured) {
    const ConstantName* found = nullptr;
    for (const ConstantName& each : constant_names) {
      if (name == each.name) found = &each;
    }
    if (found == nullptr || !(value > 0)) {
      throw Error(ErrorCode::invalid, "no constant " + name + " of value " + std::to_string(value));
    }
    this->*found->value = value;
  }
}

Tuner::Tuner(Algorithm wanted, bool claims, const Measured& measured)
    : wanted_(wanted), here_(claims ? Constants::of_shared_cores() : Constants{}) {
  here_.replace(measured);
  agreed_.replace(measured);
}

bool Tuner::small(size_t message_bytes) const { return message_bytes <= small_bytes; }

Algorithm Tuner::choose_on_gpu(Dtype dtype, size_t message_bytes) const {
  const bool fits = message_bytes <= cuda::one_shot_largest_bytes &&
                    size_of(dtype) <= cuda::one_shot_largest_item_bytes;
  switch (wanted_) {
    case Algorithm::automatic:
    case Algorithm::one_shot:
      return fits ? Algorithm::one_shot : Algorithm::two_shot;
    default:
      return wanted_;
  }
}

Algorithm Tuner::choose(Kind kind, size_t message_bytes) const {
  if (kind != Kind::allreduce) {
    return wanted_ == Algorithm::ring ? Algorithm::ring : Algorithm::two_shot;
  }
  switch (wanted_) {
    case Algorithm::automatic: {
      const bool fits = message_bytes <= one_shot_largest_bytes &&
                        static_cast<double>(message_bytes) <= here_.one_shot_bytes;
      return fits ? Algorithm::one_shot : Algorithm::two_shot;
    }
    case Algorithm::one_shot:
      return message_bytes <= one_shot_largest_bytes ? Algorithm::one_shot : Algorithm::two_shot;
    default:
      return wanted_;
  }
}

NodesChoice Tuner::across(size_t count, NodesShape shape, Dtype dtype) const {
  return choose_hierarchical(count, shape, agreed_.inside(), agreed_.rail(shape.rails), dtype,
                             NetWire::slot_bytes / partial_size_of(dtype), NetWire::lanes);
}

/// Every message of the ring waits for a kernel, which lanes hide as they hide latency; but the
/// launches are one rank's, one after the other. Through the host, the first segment and the last
/// are copied while nothing else happens; all else is taken to be hidden, which it is not on a fast
/// network.
size_t Tuner::direct_chunk(size_t count, NodesShape shape, Dtype dtype) const {
  if (needs_wire() || count == 0) return 0;
  const Rails rails{shape.rails, count, count, block_granule};
  const size_t shard = rails.shards(0, shape.rails).largest(), item_bytes = partial_size_of(dtype);
  const Blocks blocks = Blocks::even(shard, shape.nodes, block_granule);
  const size_t wanted = (blocks.largest() + NetWire::lanes - 1) / NetWire::lanes;
  const size_t chunk = std::min((wanted + block_granule - 1) / block_granule * block_granule,
                                NetWire::device_slot_bytes / item_bytes);
  Link link = rail(shape.rails);
  link.alpha_s += launch_s;
  const double launches_s =
      static_cast<double>(ring_allreduce_cost(blocks, chunk, 0).steps) * launch_s;
  const double direct_s = std::max(
      launches_s,
      across_time_s({Across::ring, chunk}, shard, shape.nodes, link, dtype, NetWire::lanes));
  const size_t segment_bytes = std::min(count * size_of(dtype), Accelerator::staging_bytes / 2);
  const double copy_s = launch_s + static_cast<double>(segment_bytes) / copied_bytes_per_s;
  return direct_s <= across(count, shape, dtype).time_s + 2 * copy_s ? chunk : 0;
}

Forecast Tuner::forecast(size_t message_bytes, NodesShape shape) const {
  const int nodes = shape.nodes, local_size = shape.local_size;
  const size_t count = (message_bytes + 3) / 4;
  if (nodes * local_size == 1 || count == 0) return {name_of(Algorithm::two_shot), 1, 0, 0};
  if (needs_wire()) return forecast_wire(count, nodes, local_size);
  if (nodes == 1) return forecast_node(count, local_size);
  if (4 * count <= Agreement::largest_payload_bytes) {
    // The leaders' agreement carries it; others put theirs where it is read, and read the sum.
    const double across_s =
        across_time_s({Across::doubling, count}, count, nodes, agreed_.rail(1), Dtype::f32);
    const double inside_s =
        local_size > 1 ? one_shot_cost(count, local_size).time_s(agreed_.inside(), Dtype::f32) : 0;
    return {name_of(Across::doubling), 1, 0,
            across_s + inside_s + (local_size > 1 ? agreed_.inside().alpha_s : 0)};
  }
  const NodesChoice choice = across(count, shape, Dtype::f32);
  return {name_of(choice.across.algorithm), (count + choice.segment - 1) / choice.segment,
          choice.across.chunk * 4, choice.time_s};
}

/// Over all ranks, as if each was on a node of its own.
Forecast Tuner::forecast_wire(size_t count, int nodes, int local_size) const {
  const size_t slot_bytes = nodes > 1 ? NetWire::slot_bytes : ShmWire::slot_bytes;
  const Link link = nodes > 1 ? agreed_.rail(1) : here_.inside();
  const AcrossChoice choice{wanted_ == Algorithm::ring ? Across::ring : Across::tree,
                            slot_bytes / 4};
  return {name_of(wanted_), 1, slot_bytes,
          across_time_s(choice, count, nodes * local_size, link, Dtype::f32,
                        nodes > 1 ? NetWire::lanes : 1)};
}

Forecast Tuner::forecast_node(size_t count, int size) const {
  const Algorithm algorithm = choose(Kind::allreduce, 4 * count);
  const Cost cost = algorithm == Algorithm::one_shot ? one_shot_cost(count, size)
                                                     : two_shot_cost(Blocks::even(count, size), 0);
  return {name_of(algorithm), 1, 0, cost.time_s(here_.inside(), Dtype::f32)};
}

}  // namespace ringreduce
