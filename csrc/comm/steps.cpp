#include "comm/steps.h"

#include "algorithms/two_shot.h"

namespace ringreduce {

void Steps::staged(const Message& message, Staged::Phases phases, const Blocks& blocks) {
  if (core_.group.size() == 1) {
    message.copy_across({0, blocks.count()});
    return;
  }
  core_.window.begin(header_, message, watch_);
  Staged rounds(core_.window, phases, blocks);
  staged_rounds(rounds, rounds.rounds(), rounds.lead());
  rounds.finish();
  if (core_.window.stopped()) throw_failure();
}

void Steps::allgather_inside(const Message& message, const Blocks& blocks) {
  Message gathered = message;
  gathered.inputs = message.outputs;
  staged(gathered, Staged::Phases::allgather, blocks);
}

void Steps::sum_inside(const Message& message, Chunk whole, const Blocks& blocks,
                       std::vector<char>& sums) {
  const size_t partial_bytes = partial_size_of(message.reduction.dtype);
  const Chunk mine = blocks[core_.group.rank()];
  sums.resize(mine.length * partial_bytes);
  Message inside = message;
  inside.reduction = unfinished(message.reduction);
  inside.outputs = {{mine.offset, mine.length, sums.data()}};
  std::vector<char> widened;
  if (partial_bytes != message.item_bytes) {
    widened.resize(whole.length * partial_bytes);
    message.for_each_run(message.inputs, whole, [&](const char* from, Chunk part) {
      const Target to{&widened[(part.offset - whole.offset) * partial_bytes], Format::partial};
      const Source source{from, Format::storage};
      reduce(inside.reduction, {&to, 1}, {&source, 1}, part.length);
    });
    inside.reduction.dtype = Dtype::f32;
    inside.item_bytes = partial_bytes;
    inside.inputs = {{whole.offset, whole.length, widened.data()}};
  }
  staged(inside, Staged::Phases::reduce_scatter, blocks);
}

void Steps::throw_failure() const { throw_aborted(core_, header_); }

}  // namespace ringreduce
