#include "net/agreement.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/error.h"

namespace ringreduce {

Agreement::Agreement(std::shared_ptr<Mpi> mpi, std::vector<int> leaders, int node, int first_tag)
    : links_(std::move(mpi), leaders, first_tag, sizeof(Note) + largest_payload_bytes,
             Links::Haste::small_messages),
      node_(node),
      nodes_(static_cast<int>(leaders.size())) {}

Agreement::Verdict Agreement::meet(uint64_t digest, bool differs, const Payload& payload,
                                   Watch& watch) {
  const size_t bytes = payload.count * partial_size_of(payload.reduction.dtype);
  State state{{digest, differs, static_cast<uint32_t>(bytes)}, payload, watch};
  int paired = 1;  // the largest power of two that is not above the number of nodes
  while (2 * paired <= nodes_) paired *= 2;
  if (node_ >= paired) {
    tell(state, node_ - paired);
    learn(state, node_ - paired, true);
  } else {
    const bool adopts = node_ + paired < nodes_;
    if (adopts) learn(state, node_ + paired, false);
    for (int bit = 1; bit < paired; bit *= 2) {
      tell(state, node_ ^ bit);
      learn(state, node_ ^ bit, false);
    }
    if (adopts) tell(state, node_ + paired);
  }
  if (state.stopped || !links_.flush(watch)) return Verdict::stopped;
  return state.note.differs ? Verdict::differ : Verdict::agreed;
}

void Agreement::tell(State& state, int node) {
  char* slot = state.stopped ? nullptr : links_.outgoing({node, 0}, state.watch);
  if (!slot) {
    state.stopped = true;
    return;
  }
  const size_t bytes = state.note.differs ? 0 : state.note.payload_bytes;
  std::memcpy(slot, &state.note, sizeof(Note));
  if (bytes > 0) std::memcpy(slot + sizeof(Note), state.payload.data, bytes);
  state.stopped = !links_.send({node, 0}, sizeof(Note) + bytes, state.watch);
}

void Agreement::learn(State& state, int node, bool replace) {
  size_t received_bytes = 0;
  const char* slot =
      state.stopped ? nullptr : links_.incoming({node, 0}, state.watch, &received_bytes);
  if (!slot) {
    state.stopped = true;
    return;
  }
  Note note{};
  std::memcpy(&note, slot, std::min(received_bytes, sizeof(Note)));
  if (note.differs || note.digest != state.note.digest) state.note.differs = 1;
  const size_t bytes = state.note.differs ? 0 : state.note.payload_bytes;
  const size_t carried = note.differs ? 0 : note.payload_bytes;
  if (received_bytes != sizeof(Note) + carried || (bytes > 0 && carried != bytes)) {
    throw Error(ErrorCode::resource,
                "a peer sent " + std::to_string(received_bytes) + " bytes to agree on a call");
  }
  if (bytes > 0) {
    const char* theirs = slot + sizeof(Note);
    char* mine = state.payload.data;
    if (replace) {
      std::memcpy(mine, theirs, bytes);
    } else {
      // The lower node's values come first on both sides, so both get the same bits.
      Source sources[] = {{mine, Format::partial}, {theirs, Format::partial}};
      if (node < node_) std::swap(sources[0], sources[1]);
      const Target target{mine, Format::partial};
      reduce(state.payload.reduction, {&target, 1}, sources, state.payload.count);
    }
  }
  links_.release({node, 0});
}

}  // namespace ringreduce
