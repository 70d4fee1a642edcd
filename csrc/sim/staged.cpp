#include "sim/staged.h"

#include <algorithm>
#include <string>

namespace ringreduce::sim {

Staging::Staging(Fibers& fibers, const Machine& machine, int size, size_t depth)
    : fibers_(fibers), machine_(machine), slots_(static_cast<size_t>(size)) {
  for (std::vector<Slot>& slots : slots_) slots.assign(depth, Slot(static_cast<size_t>(size)));
}

Staged::Staged(Staging& staging, int rank, Phases phases, const Blocks& blocks, size_t chunk,
               uint64_t rounds_before, const Message& message, Counts& counts)
    : staging_(staging),
      fibers_(staging.fibers_),
      rank_(rank),
      phases_(phases),
      blocks_(blocks),
      chunk_(chunk),
      first_round_(rounds_before + 1),
      message_(message),
      counts_(counts),
      delays_(staging.machine_, rank) {}

/// Writes this rank's contributions, or its finished block, without asking whether the slots are
/// free.
void Staged::prepare(size_t round) {
  step();
  const uint64_t number = first_round_ + round;
  if (reduces()) {
    for (int block = 0; block < blocks_.size(); ++block) {
      write(staging_.contribution(rank_, number, block), Staging::contributed(number),
            part(block, round));
    }
  } else {
    write(staging_.result(rank_, number), Staging::finished(number), part(rank_, round));
  }
  staging_.rounds_[number].prepared.push_back(fibers_.clock());
}

void Staged::write(Place& place, uint64_t version, Chunk chunk) {
  place.write(fibers_, version, [&](std::vector<char>& data) {
    data.resize(chunk_ * message_.item_bytes);
    message_.copy_in(chunk, data.data());
  });
}

void Staged::combine(size_t round) {
  step();
  const uint64_t number = first_round_ + round;
  Staging::Round& here = staging_.rounds_[number];
  if (!wait_for_all(here.prepared, "prepare", number) || !reduces()) return;
  if (!staging_.machine_.claims) {
    reduce_block(rank_, round);
    return;
  }
  for (int claim; (claim = here.num_claimed++) < blocks_.size();) {
    reduce_block(claim, round);
  }
}

void Staged::reduce_block(int block, size_t round) {
  const uint64_t number = first_round_ + round;
  const Chunk chunk = part(block, round);
  std::vector<Source> sources;
  for (int peer = 0; peer < blocks_.size(); ++peer) {
    Place& place = staging_.contribution(peer, number, block);
    const char* data = place.open(fibers_, Staging::contributed(number), "a contribution");
    sources.push_back({data, Format::storage});
  }
  Place& result = staging_.result(block, number);
  result.close();  // the one that is read and written
  result.write(fibers_, Staging::finished(number), [&](std::vector<char>& data) {
    const Target target{data.data(), Format::storage};
    reduce(message_.reduction, {&target, 1}, sources, chunk.length);
  });
  for (int peer = 0; peer < blocks_.size(); ++peer) {
    Place& place = staging_.contribution(peer, number, block);
    if (&place != &result) place.close();
  }
  fetched((sources.size() - 1) * chunk.length);
  staging_.rounds_[number].combined.push_back(fibers_.clock());
}

/// Where all blocks have owners, reduce_scatter has its block already, and waits for nobody here.
void Staged::collect(size_t round) {
  step();
  const uint64_t number = first_round_ + round;
  const bool waits = gathers() ? reduces() : staging_.machine_.claims;
  if (waits && !wait_for_all(staging_.rounds_[number].combined, "combine", number)) return;
  for (int block = 0; block < blocks_.size(); ++block) {
    if (block != rank_ && !gathers()) continue;
    Place& place = staging_.result(block, number);
    const char* data = place.open(fibers_, Staging::finished(number), "a result");
    if (!fibers_.stopped()) message_.copy_out(part(block, round), data);
    place.close();
    if (block != rank_) fetched(part(block, round).length);
  }
}

void Staged::fetched(size_t elements) {
  const size_t size_bytes = elements * message_.item_bytes;
  ++counts_.primitives;
  counts_.bytes_received += size_bytes;
  fibers_.clock() += static_cast<double>(size_bytes) * staging_.machine_.link.beta_s_per_byte;
  counts_.finish_s = fibers_.clock();
}

bool Staged::wait_for_all(const Times& times, const char* what, uint64_t round) {
  const size_t all = static_cast<size_t>(blocks_.size());
  const bool met = fibers_.wait(
      [&times, all] { return times.size() == all; },
      [=] { return "all ranks to " + std::string(what) + " round " + std::to_string(round); });
  if (!met) return false;
  const double last = *std::max_element(times.begin(), times.end());
  fibers_.clock() = std::max(fibers_.clock(), last + staging_.machine_.link.alpha_s);
  return true;
}

void Staged::step() {
  fibers_.clock() += delays_.next();
  fibers_.yield();
}

}  // namespace ringreduce::sim
