// The control memory of a communicator's ranks on one node: what each rank tells the others, and
// what they share. It lies in the first segment; rank 0's copy also holds the shared part.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "base/header.h"
#include "shm/flag.h"

namespace ringreduce {

/// Two cache lines: the neighbour of a line is prefetched with it.
inline constexpr size_t line_bytes = 128;

/// How a rank says that it has come to a collective. One cache line holds all that a peer needs of
/// a small message: that it has come, whether it means the same, and the payload.
struct alignas(64) Arrival {
  static constexpr size_t inline_bytes = 48;

  Flag flag;                     // the collective's number; published last
  std::atomic<uint64_t> digest;  // of what the ranks must agree on
  char payload[inline_bytes];
};
static_assert(sizeof(Arrival) == 64);

/// Written by its rank alone, but for the robust mutex's word, which the kernel marks when the
/// owner dies.
struct RankControl {
  /// Both by parity of the sequence number: nobody writes n + 2 before all have come to n + 1, and
  /// whoever has come to n + 1 has read all that it needs of n.
  alignas(line_bytes) Arrival arrivals[2];
  alignas(line_bytes) SharedHeader headers[2];
  /// Rounds of staged messages, counted over the life of the communicator: contributions written;
  /// blocks reduced. A symmetric two_shot, of whatever size, is one that is only reduced.
  alignas(line_bytes) Flag prepared;
  alignas(line_bytes) Flag combined;

  /// Robust; held by the life thread until the rank departs.
  alignas(line_bytes) pthread_mutex_t life;
  std::atomic<uint32_t> departed;  // 1: left by shutdown or a normal exit
  std::atomic<uint32_t> reported;  // 1: has told its user of the abort
  std::atomic<uint32_t> gpu;       // how far its GPU has come to the end (comm/accelerator.h)
  std::atomic<int32_t> pid;
  std::atomic<uint64_t> nonce;  // proof that the mapping is the one that was meant
  // Why this rank aborted; written before it sets the abort word.
  int32_t culprit, detector;  // ranks of the communicator; -1: none
  char reason[2048];
};

/// Whether the rank has come to collective `sequence`, or has gone past it.
inline bool has_come(const RankControl& control, uint64_t sequence) {
  return control.arrivals[sequence & 1].flag.reached(sequence) ||
         control.arrivals[(sequence + 1) & 1].flag.reached(sequence + 1);
}

/// The number of the last collective that the rank has come to; 0: none yet.
inline uint64_t last_seen(const RankControl& control) {
  return std::max(control.arrivals[0].flag.value(), control.arrivals[1].flag.value());
}

/// Where all ranks meet when they outnumber the cores: the last to come publishes, nobody polls the
/// others.
struct Meeting {
  alignas(line_bytes) std::atomic<uint32_t> arrived;
  alignas(line_bytes) std::atomic<uint64_t> claimed;    // slices taken
  alignas(line_bytes) std::atomic<uint64_t> completed;  // slices finished
  alignas(line_bytes) Flag go;
  alignas(line_bytes) Flag done;

  /// By the last to arrive, before it publishes `go`: all are here, so nobody uses the counters any
  /// more.
  void reset() {
    arrived.store(0, std::memory_order_relaxed);
    claimed.store(0, std::memory_order_relaxed);
    completed.store(0, std::memory_order_relaxed);
  }
};

inline constexpr int max_staged_rounds = 8;  // under way at once

/// In rank 0's segment; written by all ranks.
struct GroupControl {
  /// 0, or the first failure: code << 32 | writer + 1. The first writer wins; what it has to say is
  /// in its RankControl, written before.
  alignas(line_bytes) std::atomic<uint64_t> abort_word;
  alignas(line_bytes) std::atomic<uint32_t> mismatch;  // verdict of the last to arrive
  Meeting arrival;
  Meeting rounds[max_staged_rounds];

  /// Of several nodes: published by the leader, local rank 0, when all have met.
  alignas(line_bytes) Flag nodes_met;
  std::atomic<uint32_t> nodes_differ;
};

}  // namespace ringreduce
