#include "shm/window.h"

#include <algorithm>

#include "base/deadline.h"
#include "reduce/lines.h"

namespace ringreduce {
namespace {

// What a rank's staging memory holds, at most. Two slots are used by turns, the sooner the better:
// lines that were just taken (lines.h) are still in the caches of those who need them. With two
// ranks, chunks of 192 KB to 512 KB are equally fast from 1 MB on (AMD Zen 4, 1 MB of L2 per core).
// Ranks that share cores have its caches in common: with 8 ranks on 2 cores 0.75 MB beat 0.4 and
// 3 MB.
constexpr size_t owned_staging_bytes = size_t{4} << 20;
constexpr size_t claimed_staging_bytes = size_t{768} << 10;
constexpr size_t largest_chunk_bytes = size_t{256} << 10;

// A slot is written while the 3 lead + 1 before it may be in use (staged.h).
constexpr size_t num_slots = 3 * staged_lead + 2;
static_assert(num_slots <= max_staged_rounds);

size_t chunk_bytes_for(const Group& group) {
  const size_t areas = num_slots * static_cast<size_t>(group.size());
  return std::min(largest_chunk_bytes,
                  Window::staging_bytes(group) / areas / line_bytes * line_bytes);
}

// What a rank takes at a time from a symmetric message; the same on all ranks.
constexpr size_t slice_bytes = size_t{64} << 10;

constexpr uint32_t verdict_go = 0, verdict_mismatch = 1;

}  // namespace

size_t Window::staging_bytes(const Group& group) {
  return group.claims() ? claimed_staging_bytes : owned_staging_bytes;
}

Window::Window(Group& group, Segment staging)
    : group_(group),
      staging_(std::move(staging)),
      chunk_bytes_(chunk_bytes_for(group)),
      slot_bytes_(std::max(chunk_bytes_ * static_cast<size_t>(group.size()), largest_share_bytes)),
      sources_(static_cast<size_t>(group.size())),
      targets_(sources_.size()),
      symmetric_inputs_(sources_.size()),
      symmetric_outputs_(sources_.size()) {}

void Window::begin(const Header& header, const Message& message, Watch& watch) {
  header_ = &header;
  sequence_ = header.sequence;
  message_ = &message;
  watch_ = &watch;
  stopped_ = mismatch_ = false;
}

bool Window::wait_for(Flag& flag, uint64_t value) {
  if (!stopped_ && !wait(flag, value, group_.patience(), *watch_)) stopped_ = true;
  return !stopped_;
}

Header Window::header_of(int rank) const {
  return group_.control(rank).headers[sequence_ & 1].load();
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
  // All are here, so nobody comes back to the line of the collective before this one.
  expect_write(&group_.own().arrivals[(header_->sequence + 1) & 1]);
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
  return group_.shared().rounds[round % max_staged_rounds];
}

bool Window::all_agree() const {
  for (int peer = 0; peer < group_.size(); ++peer) {
    if (arrival_of(peer).digest.load(std::memory_order_relaxed) != digest_) return false;
  }
  return true;
}

/// The index-th of the slots to come.
char* Window::slot(int rank, size_t index) const {
  return staging_.block(rank) + (next_slot_ + index) % num_slots * slot_bytes_;
}

char* Window::share(int rank, size_t bytes) const {
  return bytes <= Arrival::inline_bytes ? arrival_of(rank).payload : slot(rank, 0);
}

/// Before this rank arrives, peers may still read what it left in the collective before this one,
/// and that lies in another slot.
void Window::share_input(Chunk chunk) {
  message_->copy_in(chunk, share(group_.rank(), chunk.length * message_->item_bytes));
}

/// A rank's own input comes from where it lies: so of two ranks each is the only one that reads the
/// other's share. (A payload in the line of the arrival is another matter: its writer asks for that
/// line in time.)
void Window::reduce_to_self(Chunk chunk) {
  const size_t bytes = chunk.length * message_->item_bytes;
  const bool only_reader = group_.size() == 2 && bytes > Arrival::inline_bytes;
  message_->for_each_pair(chunk, [&](char* input, char* output, Chunk part) {
    const size_t offset_bytes = (part.offset - chunk.offset) * message_->item_bytes;
    for (int peer = 0; peer < group_.size(); ++peer) {
      Source& source = sources_[static_cast<size_t>(peer)];
      source = {input, Format::storage};
      if (peer == group_.rank()) continue;
      source = {share(peer, bytes) + offset_bytes, Format::storage, only_reader};
    }
    const Target target{output, Format::storage};
    reduce(message_->reduction, {&target, 1}, sources_, part.length);
  });
  end_share(bytes);
}

void Window::end_share(size_t bytes) {
  if (bytes > Arrival::inline_bytes) ++next_slot_;
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
  expect_write(&group_.own().combined);
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
