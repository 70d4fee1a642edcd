// A message: the tensors of one collective seen as one run of elements, though they lie in several
// places. So a grouped call needs no packing of its own: the copy into shared memory gathers, the
// copy out scatters.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "base/chunk.h"
#include "reduce/lines.h"
#include "reduce/reduce.h"

namespace ringreduce {

/// Contiguous memory that holds elements [offset, offset + count) of the message.
struct Run {
  size_t offset, count;
  char* data;
};

/// Runs in order of offset, without gaps between them.
using Runs = std::vector<Run>;

/// The runs of `chunk`, as a message of its own that begins at 0.
inline Runs slice(const Runs& runs, Chunk chunk, size_t item_bytes) {
  Runs sliced;
  for (const Run& run : runs) {
    const size_t begin = std::max(run.offset, chunk.offset);
    const size_t end = std::min(run.offset + run.count, chunk.end());
    if (begin >= end) continue;
    sliced.push_back(
        {begin - chunk.offset, end - begin, run.data + (begin - run.offset) * item_bytes});
  }
  return sliced;
}

struct Message {
  Reduction reduction{};
  size_t item_bytes = 1;
  Runs inputs;  // never written, unless an output is the same memory
  Runs outputs;
  /// Of the inputs: partial where they are a node's sums already. Only a Wire takes such a message.
  Format input_format = Format::storage;

  /// Gathers the chunk's inputs.
  void copy_in(Chunk chunk, char* to) const {
    for_each_run(inputs, chunk, [&](char* data, Chunk part) {
      std::memcpy(to + (part.offset - chunk.offset) * item_bytes, data, part.length * item_bytes);
    });
  }

  /// Scatters finished data to the chunk's outputs; `taking`: as copy_and_take().
  void copy_out(Chunk chunk, const char* from, bool taking = false) const {
    for_each_run(outputs, chunk, [&](char* data, Chunk part) {
      const char* const begin = from + (part.offset - chunk.offset) * item_bytes;
      if (taking) {
        copy_and_take(data, begin, part.length * item_bytes);
      } else {
        std::memcpy(data, begin, part.length * item_bytes);
      }
    });
  }

  /// Inputs to outputs, unless they are the same memory: what a rank has and keeps.
  void copy_across(Chunk chunk) const {
    for_each_pair(chunk, [&](const char* input, char* output, Chunk part) {
      if (input != output) std::memcpy(output, input, part.length * item_bytes);
    });
  }

  /// visit(data, part) for every piece of `chunk` that lies in one place; what the runs do not
  /// cover is left out.
  template <class Visit>
  void for_each_run(const Runs& runs, Chunk chunk, Visit visit) const {
    auto run = std::upper_bound(
        runs.begin(), runs.end(), chunk.offset,
        [](size_t offset, const Run& each) { return offset < each.offset + each.count; });
    for (; run != runs.end() && run->offset < chunk.end(); ++run) {
      const size_t begin = std::max(run->offset, chunk.offset);
      const size_t end = std::min(run->offset + run->count, chunk.end());
      if (begin < end)
        visit(run->data + (begin - run->offset) * bytes_per_item(runs), Chunk{begin, end - begin});
    }
  }

  /// The same where a piece must lie in one place on both sides: visit(input, output, part).
  template <class Visit>
  void for_each_pair(Chunk chunk, Visit visit) const {
    for_each_run(inputs, chunk, [&](char* input, Chunk in_part) {
      for_each_run(outputs, in_part, [&](char* output, Chunk part) {
        visit(input + (part.offset - in_part.offset) * bytes_per_item(inputs), output, part);
      });
    });
  }

 private:
  size_t bytes_per_item(const Runs& runs) const {
    const bool partial = &runs == &inputs && input_format == Format::partial;
    return partial ? partial_size_of(reduction.dtype) : item_bytes;
  }
};

}  // namespace ringreduce
