#include "shm/window.h"

#include <algorithm>

#include "base/deadline.h"

namespace ringreduce {
namespace {

// A ring small enough for the L2 cache is slow: a line that is dirty in another core's L2 is the
// dearest to fetch. Megabytes written well ahead of the reader were three times faster (AMD Zen 4,
// 2 cores).
constexpr size_t staging_ring_bytes = size_t{4} << 20;
constexpr size_t largest_chunk_bytes = size_t{128} << 10;
constexpr size_t share_parities = 2;

// What a rank takes at a time from a symmetric message; the same on all ranks.
constexpr size_t slice_bytes = size_t{64} << 10;

constexpr uint32_t verdict_go = 0, verdict_mismatch = 1;

}  // namespace

size_t Window::staging_bytes() { return share_parities * largest_share_bytes + staging_ring_bytes; }

Window::Window(Group& group, Segment staging)
    : group_(group),
      staging_(std::move(staging)),
      sources_(static_cast<size_t>(group.size())),
      targets_(sources_.size()),
      symmetric_inputs_(sources_.size()),
      symmetric_outputs_(sources_.size()) {
  // Where ranks share cores every round costs context switches, so rounds are few and large there.
  lead_ = group.claims() ? 1 : 2;
  depth_ = 3 * lead_ + 2;
  static_assert(3 * 2 + 2 <= max_staged_rounds);
  const size_t areas = depth_ * (static_cast<size_t>(group.size()) + 1);
  chunk_bytes_ =
      std::min(largest_chunk_bytes, staging_ring_bytes / areas / line_bytes * line_bytes);
}

void Window::begin(const Header& header, const Message& message, Watch& watch) {
  header_ = &header;
  message_ = &message;
  watch_ = &watch;
  stopped_ = mismatch_ = false;
}

bool Window::wait_for(Flag& flag, uint64_t value) {
  if (!stopped_ && !wait(flag, value, group_.patience(), *watch_)) stopped_ = true;
  return !stopped_;
}

Header Window::header_of(int rank) const {
  return group_.control(rank).headers[header_->sequence & 1].load();
}

Arrival& Window::arrival_of(int rank) const {
  return group_.control(rank).arrivals[header_->sequence & 1];
}

bool Window::arrive(const std::function<void()>& alone) {
  Arrival& own = arrival_of(group_.rank());
  digest_ = header_->digest();
  group_.own().headers[header_->sequence & 1].store(*header_);
  own.digest.store(digest_, std::memory_order_relaxed);
  own.flag.publish(header_->sequence);
  const bool met = group_.claims() ? arrive_by_meeting(alone) : arrive_by_flags();
  if (met) stamp_meeting();
  return met && !mismatch_;
}

void Window::stamp_meeting() {
  if (met_ns_ != nullptr && *met_ns_ == 0) *met_ns_ = now_ns();
}

bool Window::arrive_by_flags() {
  for (int peer = 0; peer < group_.size(); ++peer) {
    if (!wait_for(arrival_of(peer).flag, header_->sequence)) return false;
  }
  mismatch_ = !all_agree();
  return true;
}

/// The last to arrive compares for all. It resets the counters of the previous collective, which
/// nobody uses any more: all have left it, since all are here. `go` carries that to them (release,
/// acquire).
bool Window::arrive_by_meeting(const std::function<void()>& alone) {
  GroupControl& shared = group_.shared();
  Meeting& arrival = shared.arrival;
  const auto ranks = static_cast<uint32_t>(group_.size());
  if (arrival.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == ranks) {
    stamp_meeting();
    arrival.reset();
    staged_round(next_round_).reset();
    const bool agreed = all_agree();
    shared.mismatch.store(agreed ? verdict_go : verdict_mismatch, std::memory_order_relaxed);
    if (agreed && alone) alone();
    arrival.go.publish(header_->sequence);
  } else if (!wait_for(arrival.go, header_->sequence)) {
    return false;
  }
  mismatch_ = shared.mismatch.load(std::memory_order_relaxed) == verdict_mismatch;
  return true;
}

Meeting& Window::staged_round(uint64_t round) const {
  return group_.shared().rounds[round % depth_];
}

bool Window::all_agree() const {
  for (int peer = 0; peer < group_.size(); ++peer) {
    if (arrival_of(peer).digest.load(std::memory_order_relaxed) != digest_) return false;
  }
  return true;
}

char* Window::share(int rank, size_t bytes) const {
  if (bytes <= Arrival::inline_bytes) return arrival_of(rank).payload;
  return staging_.block(rank) + (header_->sequence & 1) * largest_share_bytes;
}

char* Window::contribution(int rank, uint64_t round, int block) const {
  const size_t area =
      round % depth_ * (static_cast<size_t>(group_.size()) + 1) + static_cast<size_t>(block);
  return staging_.block(rank) + share_parities * largest_share_bytes + area * chunk_bytes_;
}

void Window::share_input(Chunk chunk) {
  message_->copy_in(chunk, share(group_.rank(), chunk.length * message_->item_bytes));
}

void Window::reduce_to_self(Chunk chunk) {
  const size_t bytes = chunk.length * message_->item_bytes;
  message_->for_each_run(message_->outputs, chunk, [&](char* output, Chunk part) {
    const size_t offset_bytes = (part.offset - chunk.offset) * message_->item_bytes;
    for (int peer = 0; peer < group_.size(); ++peer) {
      sources_[static_cast<size_t>(peer)] = {share(peer, bytes) + offset_bytes, Format::storage};
    }
    const Target target{output, Format::storage};
    reduce(message_->reduction, {&target, 1}, sources_, part.length);
  });
}

void Window::reduce_shares(const Reduction& reduction, size_t count, const Target& target) {
  for (int peer = 0; peer < group_.size(); ++peer) {
    sources_[static_cast<size_t>(peer)] = {share(peer, count * message_->item_bytes),
                                           Format::storage};
  }
  ringreduce::reduce(reduction, {&target, 1}, sources_, count);
}

void Window::set_symmetric(int rank, const char* input, char* output) {
  symmetric_inputs_[static_cast<size_t>(rank)] = input;
  symmetric_outputs_[static_cast<size_t>(rank)] = output;
}

void Window::begin_symmetric(size_t count) {
  slice_elements_ = slice_bytes / message_->item_bytes;
  next_owned_ = 0;
  owned_ = Blocks::even(count, group_.size(), line_bytes)[group_.rank()];
  if (group_.claims()) owned_ = {0, count};
}

/// The next piece of what this rank owns, or that nobody has claimed yet.
bool Window::next_slice(Chunk& slice) {
  if (stopped_) return false;
  Meeting& arrival = group_.shared().arrival;
  const size_t index =
      group_.claims() ? arrival.claimed.fetch_add(1, std::memory_order_relaxed) : next_owned_++;
  slice = owned_.piece(index, slice_elements_);
  return !slice.empty();
}

void Window::reduce_slice(Chunk slice) {
  const size_t offset_bytes = slice.offset * message_->item_bytes;
  for (size_t peer = 0; peer < sources_.size(); ++peer) {
    sources_[peer] = {symmetric_inputs_[peer] + offset_bytes, Format::storage};
    targets_[peer] = {symmetric_outputs_[peer] + offset_bytes, Format::storage};
  }
  reduce(message_->reduction, targets_, sources_, slice.length);
}

void Window::reduce_to_all(Chunk slice) {
  reduce_slice(slice);
  if (!group_.claims()) return;
  // Who finishes the last slice has, through this counter, acquired all the others' stores.
  Meeting& arrival = group_.shared().arrival;
  const size_t slices = (owned_.length + slice_elements_ - 1) / slice_elements_;
  if (arrival.completed.fetch_add(1, std::memory_order_acq_rel) + 1 == slices) {
    arrival.done.publish(header_->sequence);
  }
}

/// Returns when every output is complete.
void Window::done() {
  if (group_.claims()) {
    if (owned_.length > 0) wait_for(group_.shared().arrival.done, header_->sequence);
    return;
  }
  group_.own().combined.publish(++next_round_);
  for (int peer = 0; peer < group_.size(); ++peer) {
    if (!wait_for(group_.control(peer).combined, next_round_)) return;
  }
}

}  // namespace ringreduce
