// A team: the blocks of one number in the kernels of all ranks. How they meet, tell each other how
// far they are, and leave when something is wrong. Moves no data.
//
// Words in peers' memory. Each has one writer and says which call it belongs to, so nothing is ever
// reset, and a call that ends early leaves nothing behind. A word of this call is found by
// comparing for equality; one that was left behind would have to be 2^32 calls old to be taken for
// it. All ranks count their calls alike: each kernel is one, whatever becomes of it.
//
//   arrived   digest << 32 | call     in call c only the words of c's parity are written. They stay
//     until everybody has read them: a rank writes them again in c + 2, which it begins after its
//     kernel c + 1 has seen all ranks arrive, hence has seen all kernels c end.
//   steps     call << 32 | count      written after all have arrived. Nobody writes the next call's
//     before all have arrived there, that is, before the last reader of this call's has left.
//
// What is published: __syncthreads, then one thread per peer stores with release. The release is
// cumulative, so it covers all that the block's threads have written or read before. What is
// observed: one thread per peer loads with acquire, then __syncthreads, after which the same holds
// for all threads. Every __syncthreads is reached by all threads of the block: what they branch on,
// `stopped_`, is the same in all of them, being the result of __syncthreads_or.
#pragma once

#include "cuda/kernels.h"
#include "cuda/memory.cuh"
#include "cuda/slab.h"

namespace ringreduce::cuda {

/// What a thread that waits looks at beside its word, now and then: both are far away.
class Patience {
 public:
  enum class Verdict { wait_on, aborted, timeout };

  __device__ explicit Patience(const DeviceCall& call) : call_(call) {}

  __device__ Verdict look() {
    pause();
    if (++looks_ % looks_between_checks != 0) return Verdict::wait_on;
    const SlabHead& own = Slab{call_.slabs[call_.rank]}.head();
    if (load_relaxed(&own.dead) != 0) return Verdict::aborted;
    if (load_relaxed(&call_.status->abort) != 0) return Verdict::aborted;
    const uint64_t now_ns = clock_ns();
    if (since_ns_ == 0) since_ns_ = now_ns;
    return now_ns - since_ns_ > call_.timeout_ns ? Verdict::timeout : Verdict::wait_on;
  }
  /// Whether the last look was one of those.
  __device__ bool checked() const { return looks_ > 0 && looks_ % looks_between_checks == 0; }

 private:
  // About 0.1 ms: a look takes a good half microsecond, and the abort word is in host memory.
  static constexpr uint32_t looks_between_checks = 128;

  const DeviceCall& call_;
  uint32_t looks_ = 0;
  uint64_t since_ns_ = 0;
};

class Team {
 public:
  __device__ explicit Team(const DeviceCall& call)
      : call_(call), block_(static_cast<int>(blockIdx.x)), number_(own().calls[block_] + 1) {
    stopped_ = __syncthreads_or(load_relaxed(&own().dead) != 0);
    if (first_thread()) store_relaxed(&call_.status->begun, number_);
  }

  /// Calls of the next kernel are counted on from here, also by blocks that this one does not have.
  /// A rank that gives up takes its arrival back, lest one that comes later works with it alone.
  __device__ void leave() {
    __syncthreads();
    if (lost_) {
      for_each_peer(
          [&](int peer) { store_relaxed(arrived(peer, block_, call_.rank), uint64_t{0}); });
    }
    const int stride = static_cast<int>(gridDim.x * blockDim.x);
    const int first = block_ + static_cast<int>(gridDim.x * threadIdx.x);
    for (int block = first; block < max_blocks; block += stride) own().calls[block] = number_;
    if (first_thread()) store_relaxed(&call_.status->left, number_);
  }

  __device__ int block() const { return block_; }
  __device__ int blocks() const { return static_cast<int>(gridDim.x); }
  __device__ uint32_t number() const { return number_; }
  __device__ uint32_t parity() const { return number_ & 1; }
  __device__ bool stopped() const { return stopped_; }
  __device__ Slab slab(int rank) const { return {call_.slabs[rank]}; }

  /// Tells all ranks that this one is here, and with what; and that what the block has written
  /// until now can be read.
  __device__ void announce() {
    __syncthreads();
    if (stopped_) return;
    for_each_peer([&](int peer) { store_release(arrived(peer, block_, call_.rank), arrival()); });
  }

  /// Until all ranks have announced themselves. False: not all of them with the same call; then
  /// nothing may be written. Waits for the last one all the same, or a fast rank could write its
  /// next words over those that a slow one has not read.
  __device__ bool met() {
    bool mismatch = false;
    wait_for_each_peer([&](int peer) { return wait_arrived(peer, mismatch); });
    stopped_ |= __syncthreads_or(mismatch) != 0;
    return !stopped_;
  }

  /// `count` of a step are done, and what was written for them can be read.
  __device__ void publish(Step step, uint32_t count) {
    __syncthreads();
    if (stopped_) return;
    for_each_peer([&](int peer) {
      store_release(&slab(peer).head().steps[static_cast<int>(step)][block_][call_.rank],
                    word(count));
    });
  }

  /// Until all peers have published that many. False: the call is lost.
  __device__ bool wait(Step step, uint32_t count) {
    const auto& words = own().steps[static_cast<int>(step)][block_];
    wait_for_each_peer([&](int peer) { return wait_for(words[peer], count, peer); });
    return !stopped_;
  }

  /// One thread's part of a wait for a word of `peer`; the block must agree() on the result.
  __device__ bool wait_for(const uint64_t& at, uint32_t count, int peer) {
    Patience patience(call_);
    for (;;) {
      const uint64_t got = load_acquire(&at);
      if (got >> 32 == number_ && static_cast<uint32_t>(got) >= count) return true;
      if (!go_on(patience, peer)) return false;
    }
  }
  __device__ bool agree(bool good) {
    lost_ |= __syncthreads_or(!good) != 0;
    stopped_ |= lost_;
    return !stopped_;
  }

  /// One more look. False: not worth it.
  __device__ bool go_on(Patience& patience, int peer) {
    const Patience::Verdict verdict = patience.look();
    if (verdict == Patience::Verdict::wait_on) return true;
    if (verdict == Patience::Verdict::timeout) report(Trouble::timeout, peer);
    store_relaxed(&own().dead, 1u);
    return false;
  }

  __device__ uint64_t word(uint32_t count) const { return uint64_t{number_} << 32 | count; }

 private:
  __device__ SlabHead& own() const { return slab(call_.rank).head(); }
  __device__ bool first_thread() const { return block_ == 0 && threadIdx.x == 0; }
  __device__ uint64_t arrival() const { return uint64_t{call_.digest} << 32 | number_; }
  __device__ uint64_t* arrived(int at, int block, int from) const {
    return &slab(at).head().arrived[parity()][block][from];
  }

  template <class Visit>
  __device__ void for_each_peer(Visit visit) const {
    for (int peer = static_cast<int>(threadIdx.x); peer < call_.size; peer += blockDim.x) {
      if (peer != call_.rank) visit(peer);
    }
  }
  template <class Wait>
  __device__ void wait_for_each_peer(Wait wait) {
    bool good = true;
    if (!stopped_) for_each_peer([&](int peer) { good = good && wait(peer); });
    agree(good);
  }

  /// A peer that came with something else may have fewer blocks than this rank; it always has the
  /// first one.
  __device__ bool wait_arrived(int peer, bool& mismatch) {
    Patience patience(call_);
    for (;;) {
      uint64_t got = load_acquire(arrived(call_.rank, block_, peer));
      if (got == arrival()) return true;
      if (patience.checked()) {
        const uint64_t first = load_acquire(arrived(call_.rank, 0, peer));
        if (static_cast<uint32_t>(first) == number_ && first != arrival()) got = first;
      }
      if (static_cast<uint32_t>(got) == number_) {
        if (block_ == 0) report(Trouble::mismatch, peer);
        mismatch = true;
        return true;
      }
      if (!go_on(patience, peer)) return false;
    }
  }

  /// Both words at once, so that of several findings one stands. The first one stays; of
  /// mismatches, which all blocks find, only the first block tells.
  __device__ void report(Trouble trouble, int peer) const {
    if (load_relaxed(&call_.status->trouble) != 0) return;
    static_assert(offsetof(Status, peer) == offsetof(Status, trouble) + 4);
    store_relaxed(reinterpret_cast<uint64_t*>(&call_.status->trouble),
                  uint64_t{static_cast<uint32_t>(peer)} << 32 | static_cast<uint32_t>(trouble));
  }

  const DeviceCall& call_;
  const int block_;
  const uint32_t number_;
  bool stopped_ = false;  // nothing may be moved: a call that is lost, or one that does not match
  bool lost_ = false;
};

}  // namespace ringreduce::cuda
