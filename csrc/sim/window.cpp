#include "sim/window.h"

#include <algorithm>

namespace ringreduce::sim {

void Place::write(Fibers& fibers, uint64_t version,
                  const std::function<void(std::vector<char>&)>& fill) {
  if (num_readers_ > 0) {
    fibers.fail("rank " + std::to_string(fibers.rank()) + " overwrites number " +
                std::to_string(version_) + " with " + std::to_string(version) +
                " while somebody reads it");
  }
  version_ = version;
  writing_ = true;
  fibers.yield();
  if (!fibers.stopped()) fill(data_);
  writing_ = false;
}

const char* Place::open(Fibers& fibers, uint64_t version, const std::string& name) {
  if (version_ != version || writing_) {
    fibers.fail("rank " + std::to_string(fibers.rank()) + " wants " + name + ", number " +
                std::to_string(version) + ", and finds " + std::to_string(version_));
  }
  ++num_readers_;
  fibers.yield();
  return data_.data();
}

SharedMemory::SharedMemory(Fibers& fibers, const Machine& machine, const Blocks& blocks,
                           size_t slice, size_t places)
    : fibers_(fibers),
      machine_(machine),
      blocks_(blocks),
      slice_(slice),
      shares_(static_cast<size_t>(blocks.size()), std::vector<Place>(places)) {}

SharedMemory::Call& SharedMemory::call(uint64_t sequence) {
  Call& call = calls_[sequence];
  call.messages.resize(static_cast<size_t>(size()));
  return call;
}

Window::Window(SharedMemory& shared, int rank)
    : shared_(shared), fibers_(shared.fibers_), rank_(rank), delays_(shared.machine_, rank) {
  fibers_.clock() += delays_.next();
}

void Window::begin(const Message& message, Counts& counts) {
  ++sequence_;
  message_ = &message;
  counts_ = &counts;
  num_taken_ = 0;
}

bool Window::arrive() {
  step();
  SharedMemory::Call& call = this->call();
  call.messages[static_cast<size_t>(rank_)] = message_;
  call.counts.insert(message_->inputs.front().count);
  call.arrived.push_back(fibers_.clock());
  return meet(call.arrived, "arrive") && call.counts.size() == 1;
}

Place& Window::share(int rank) {
  std::vector<Place>& places = shared_.shares_[static_cast<size_t>(rank)];
  return places[sequence_ % places.size()];
}

void Window::share_input(Chunk chunk) {
  step();
  share(rank_).write(fibers_, sequence_, [&](std::vector<char>& data) {
    data.resize(chunk.length * message_->item_bytes);
    message_->copy_in(chunk, data.data());
  });
}

void Window::reduce_to_self(Chunk chunk) {
  step();
  std::vector<Source> sources;
  for (int peer = 0; peer < shared_.size(); ++peer) {
    const char* data = share(peer).open(fibers_, sequence_, "an input");
    sources.push_back({data, Format::storage});
  }
  const Target target{message_->outputs.front().data, Format::storage};
  if (!fibers_.stopped()) reduce(message_->reduction, {&target, 1}, sources, chunk.length);
  for (int peer = 0; peer < shared_.size(); ++peer) share(peer).close();
  move((sources.size() - 1) * chunk.length * message_->item_bytes, 0);
}

bool Window::next_slice(Chunk& slice) {
  step();
  if (fibers_.stopped()) return false;
  if (shared_.machine_.claims) {
    slice = Chunk{0, shared_.blocks_.count()}.piece(call().num_claimed++, shared_.slice_);
  } else {
    slice = shared_.blocks_[rank_].piece(num_taken_++, shared_.slice_);
  }
  return !slice.empty();
}

void Window::reduce_to_all(Chunk slice) {
  const size_t slice_bytes = slice.length * message_->item_bytes;
  const size_t offset_bytes = slice.offset * message_->item_bytes;
  std::vector<Source> sources;
  std::vector<Target> targets;
  for (const Message* message : call().messages) {
    sources.push_back({message->inputs.front().data + offset_bytes, Format::storage});
    targets.push_back({message->outputs.front().data + offset_bytes, Format::storage});
  }
  reduce(message_->reduction, targets, sources, slice.length);
  const size_t others = sources.size() - 1;
  move(others * slice_bytes, others * slice_bytes);
}

/// No slice is left to take: when all ranks have come here, all slices are finished.
void Window::done() {
  call().finished.push_back(fibers_.clock());
  meet(call().finished, "finish");
}

/// Something begins here that others may come before.
void Window::step() {
  fibers_.clock() += delays_.next();
  fibers_.yield();
}

bool Window::meet(const Times& times, const char* what) {
  const size_t all = static_cast<size_t>(shared_.size());
  const bool met = fibers_.wait(
      [&times, all] { return times.size() == all; },
      [&times, all, what] { return std::to_string(all - times.size()) + " ranks to " + what; });
  if (!met) return false;
  const double last = *std::max_element(times.begin(), times.end());
  counts_->finish_s = fibers_.clock() =
      std::max(fibers_.clock(), last + shared_.machine_.link.alpha_s);
  return true;
}

void Window::move(size_t fetched_bytes, size_t stored_bytes) {
  ++counts_->primitives;
  counts_->bytes_received += fetched_bytes;
  counts_->bytes_sent += stored_bytes;
  fibers_.clock() +=
      static_cast<double>(fetched_bytes + stored_bytes) * shared_.machine_.link.beta_s_per_byte;
  counts_->finish_s = fibers_.clock();
}

}  // namespace ringreduce::sim
