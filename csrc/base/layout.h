// Where the elements of a tensor lie: shape and strides. Tensors that are not C-contiguous are
// packed into logical order before a collective and unpacked after it; everything else sees
// contiguous memory only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ringreduce {

struct Layout {
  std::vector<int64_t> shape;
  std::vector<int64_t> strides_bytes;  // empty: C-contiguous
  size_t item_bytes = 1;

  bool contiguous() const { return strides_bytes.empty(); }
};

/// Copies a strided tensor's elements, in logical order, to contiguous `packed`.
void pack(const Layout& layout, const char* strided, char* packed);

/// The way back.
void unpack(const Layout& layout, const char* packed, char* strided);

}  // namespace ringreduce
