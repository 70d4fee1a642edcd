#include "base/header.h"

#include <cstring>

#include "base/dtype.h"
#include "base/op.h"

namespace ringreduce {

const char* name_of(Kind kind) {
  static constexpr const char* names[] = {"barrier",   "allreduce", "reduce_scatter", "allgather",
                                          "broadcast", "reduce",    "empty"};
  const auto index = static_cast<size_t>(kind);
  return index < std::size(names) ? names[index] : "unknown collective";
}

uint64_t Header::digest() const {
  uint64_t words[header_words];
  std::memcpy(words, this, sizeof(words));
  uint64_t hash = 0;
  for (int word = 0; word < num_agreed; ++word) {
    hash = (hash ^ words[word]) * 0x9e3779b97f4a7c15ull;
    hash ^= hash >> 32;
  }
  return hash;
}

std::string Header::describe() const {
  const Kind what = static_cast<Kind>(kind);
  std::string text = name_of(what);
  if (what == Kind::barrier) return text + "()";
  if (what == Kind::allocate) return text + "(" + std::to_string(count) + " bytes)";
  text += "(";
  const bool reduces =
      what == Kind::allreduce || what == Kind::reduce_scatter || what == Kind::reduce;
  if (reduces) text += std::string(name_of(static_cast<Op>(op))) + ", ";
  text += name_of(static_cast<Dtype>(dtype));
  text += what == Kind::allgather ? ", row shape (" : ", shape (";
  for (int dimension = 0; dimension < dimensions && dimension < max_dimensions; ++dimension) {
    if (dimension > 0) text += ", ";
    text += std::to_string(shape[static_cast<size_t>(dimension)]);
  }
  if (dimensions > max_dimensions) text += ", ...";
  text += dimensions == 1 ? ",)" : ")";
  if (num_tensors > 1) {
    text += " and " + std::to_string(num_tensors - 1) + " more tensors, " + std::to_string(count) +
            " elements in all";
  }
  if (on_gpu != 0) text += ", on a GPU";
  if (what == Kind::broadcast || what == Kind::reduce || root != 0)
    text += ", root " + std::to_string(root);
  return text + ")";
}

void SharedHeader::store(const Header& header) {
  uint64_t words[header_words];
  std::memcpy(words, &header, sizeof(words));
  for (int word = 0; word < header_words; ++word) {
    words_[word].store(words[word], std::memory_order_relaxed);
  }
}

Header SharedHeader::load() const {
  uint64_t words[header_words];
  for (int word = 0; word < header_words; ++word) {
    words[word] = words_[word].load(std::memory_order_relaxed);
  }
  Header header;
  std::memcpy(static_cast<void*>(&header), words, sizeof(words));
  return header;
}

}  // namespace ringreduce
