// The slab: memory of every rank that the others' kernels reach, and where in it lies what. The
// same layout on all ranks. Every word has one writer, a rank or one of its blocks; it is zero
// before the first call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/device.h"
#include "cuda/kernels.h"

namespace ringreduce::cuda {

/// Blocks per kernel.
inline constexpr int max_blocks = 64;
/// Blocks per kernel that have FIFOs for ring and tree.
inline constexpr int max_wire_blocks = 36;

/// Half of it belongs to calls of even numbers, half to odd ones.
inline constexpr size_t staging_bytes = size_t{32} << 20;
/// Where pieces of a message begin in the staging memory.
inline constexpr size_t staging_granule_bytes = 128;

/// A message of one_shot travels as lines that hold 8 bytes of it each, beside the number of the
/// call.
inline constexpr size_t line_data_bytes = 8;
inline constexpr size_t line_bytes = 16;
inline constexpr size_t lines_per_peer = one_shot_largest_bytes / line_data_bytes;

/// A block's FIFOs: one from the previous rank on the ring; or, in each of two trees, one from each
/// of two children and one from the parent.
inline constexpr size_t fifo_slot_bytes = size_t{64} << 10;
inline constexpr int fifo_slots_per_block = 12;
inline constexpr int tree_fifos = 6;
inline constexpr int ring_slots = fifo_slots_per_block;
inline constexpr int tree_slots = fifo_slots_per_block / tree_fifos;

/// Words that say how far a peer's block is in the call that is under way: the number of the call
/// and a count.
enum class Step : int { prepared, combined, left };
inline constexpr int num_steps = 3;

struct SlabHead {
  // Touched by this rank's kernels alone.
  uint32_t calls[max_blocks];  // so many have been: the same number everywhere between two calls
  uint32_t dead;               // not 0: a wait ended badly, and no call moves data any more

  // Written by peers.
  alignas(128) uint64_t arrived[2][max_blocks][max_ranks];  // calls of even and of odd numbers
  alignas(128) uint64_t steps[num_steps][max_blocks][max_ranks];
  alignas(128) uint64_t filled[max_wire_blocks][tree_fifos];   // by who sends
  alignas(128) uint64_t emptied[max_wire_blocks][tree_fifos];  // by who receives
};

RR_HOST_DEVICE constexpr size_t round_up(size_t bytes, size_t granule) {
  return (bytes + granule - 1) / granule * granule;
}

/// Elements between cuts of a message: no two blocks then write to one line of 128 bytes, if the
/// tensors begin at one.
RR_HOST_DEVICE constexpr size_t granule_of(size_t item_bytes) {
  return staging_granule_bytes / item_bytes;
}

/// One rank's slab, as its own or another rank's kernel sees it.
struct Slab {
  char* base;

  RR_HOST_DEVICE SlabHead& head() const { return *reinterpret_cast<SlabHead*>(base); }

  RR_HOST_DEVICE static constexpr size_t staging_offset() { return 256 << 10; }
  RR_HOST_DEVICE static constexpr size_t lines_offset() { return staging_offset() + staging_bytes; }
  RR_HOST_DEVICE static constexpr size_t lines_bytes(int ranks) {
    return 2 * static_cast<size_t>(ranks) * lines_per_peer * line_bytes;
  }
  RR_HOST_DEVICE static constexpr size_t fifos_offset(int ranks) {
    return lines_offset() + lines_bytes(ranks);
  }
  RR_HOST_DEVICE static constexpr size_t fifos_bytes() {
    return max_wire_blocks * fifo_slots_per_block * fifo_slot_bytes;
  }

  /// For calls of numbers that have this parity.
  RR_HOST_DEVICE char* staging(uint32_t parity) const {
    return base + staging_offset() + parity * (staging_bytes / 2);
  }
  /// What `from` sends in calls of numbers that have this parity.
  RR_HOST_DEVICE char* lines(uint32_t parity, int from, int ranks) const {
    const size_t box = parity * static_cast<size_t>(ranks) + static_cast<size_t>(from);
    return base + lines_offset() + box * lines_per_peer * line_bytes;
  }
  /// Slot `slot` of a block, counted over all its FIFOs.
  RR_HOST_DEVICE char* fifo_slot(int block, int slot, int ranks) const {
    const int number = block * fifo_slots_per_block + slot;
    return base + fifos_offset(ranks) + static_cast<size_t>(number) * fifo_slot_bytes;
  }
};
static_assert(sizeof(SlabHead) <= Slab::staging_offset());

}  // namespace ringreduce::cuda
