// What a rank publishes of a collective before any data moves: enough to find out that two ranks
// mean different things, and to tell both sides in words. Sixteen 64-bit words, so it can be copied
// through shared memory word by word and sent over any wire.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>

namespace ringreduce {

enum class Kind : uint8_t {
  barrier,
  allreduce,
  reduce_scatter,
  allgather,
  broadcast,
  reduce,
  allocate
};

const char* name_of(Kind kind);

struct Header {
  static constexpr int max_dimensions = 7;  // what a message shows; the hash covers all of them
  static constexpr int num_agreed = 12;     // words [0, num_agreed) must be equal on all ranks

  // Agreed by all ranks.
  uint64_t sequence = 0;  // counts the collectives of a communicator from 1
  uint8_t kind = 0, op = 0, dtype = 0, dimensions = 0;
  int32_t root = 0;
  uint32_t num_tensors = 0;  // more than one: a grouped call
  uint32_t on_gpu = 0;       // 1: the tensors are in device memory
  uint64_t count = 0;        // elements (allgather: elements of a row; allocate: bytes)
  uint64_t shapes_hash = 0;  // over all tensors of the call
  std::array<uint64_t, max_dimensions> shape{};  // of the first tensor

  // A rank's own.
  uint64_t rows = 0;     // allgather: the first dimension
  uint64_t segment = 0;  // 0: private memory; else 1 + the symmetric segment that holds the output
  uint64_t input_offset = 0;  // bytes from that segment's start
  uint64_t output_offset = 0;

  /// A hash of the words that must be equal.
  uint64_t digest() const;
  /// "allreduce(sum, float32, shape (2, 3))"
  std::string describe() const;
};

inline constexpr int header_words = 16;
static_assert(sizeof(Header) == header_words * sizeof(uint64_t));

/// A header in memory that others read. One rank writes it; whoever acquires the flag published
/// after it reads it whole. A timeout report may read it at any moment: word-wise atomics make that
/// merely stale or mixed.
class SharedHeader {
 public:
  void store(const Header& header);
  Header load() const;

 private:
  std::atomic<uint64_t> words_[header_words];
};

}  // namespace ringreduce
