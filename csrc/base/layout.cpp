#include "base/layout.h"

#include <cstring>

namespace ringreduce {
namespace {

/// `item_bytes` is a compile-time constant for the usual sizes, so a copy is one load and one
/// store.
template <size_t item_bytes>
void copy_row(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    std::memcpy(to + i * to_stride, from + i * from_stride, item_bytes);
  }
}

void copy_row(size_t item_bytes, char* to, int64_t to_stride, const char* from, int64_t from_stride,
              int64_t length) {
  const auto item = static_cast<int64_t>(item_bytes);
  if (to_stride == item && from_stride == item) {
    std::memcpy(to, from, static_cast<size_t>(length) * item_bytes);
    return;
  }
  switch (item_bytes) {
    case 1:
      return copy_row<1>(to, to_stride, from, from_stride, length);
    case 2:
      return copy_row<2>(to, to_stride, from, from_stride, length);
    case 4:
      return copy_row<4>(to, to_stride, from, from_stride, length);
    case 8:
      return copy_row<8>(to, to_stride, from, from_stride, length);
    default:
      return copy_row<16>(to, to_stride, from, from_stride, length);
  }
}

/// Calls visit(strided offset, row length) for every innermost row, in logical order.
template <class Visit>
void for_each_row(const Layout& layout, Visit visit) {
  const size_t dimensions = layout.shape.size();
  for (int64_t extent : layout.shape) {
    if (extent == 0) return;
  }
  if (dimensions == 0) return visit(int64_t{0}, int64_t{1});
  std::vector<int64_t> index(dimensions, 0);
  int64_t offset = 0;
  for (;;) {
    visit(offset, layout.shape.back());
    size_t dimension = dimensions - 1;
    for (;;) {
      if (dimension == 0) return;
      --dimension;
      offset += layout.strides_bytes[dimension];
      if (++index[dimension] < layout.shape[dimension]) break;
      offset -= layout.strides_bytes[dimension] * layout.shape[dimension];
      index[dimension] = 0;
    }
  }
}

int64_t row_stride(const Layout& layout) {
  return layout.shape.empty() ? static_cast<int64_t>(layout.item_bytes)
                              : layout.strides_bytes.back();
}

}  // namespace

void pack(const Layout& layout, const char* strided, char* packed) {
  const auto item = static_cast<int64_t>(layout.item_bytes);
  for_each_row(layout, [&](int64_t offset, int64_t length) {
    copy_row(layout.item_bytes, packed, item, strided + offset, row_stride(layout), length);
    packed += length * item;
  });
}

void unpack(const Layout& layout, const char* packed, char* strided) {
  const auto item = static_cast<int64_t>(layout.item_bytes);
  for_each_row(layout, [&](int64_t offset, int64_t length) {
    copy_row(layout.item_bytes, strided + offset, row_stride(layout), packed, item, length);
    packed += length * item;
  });
}

}  // namespace ringreduce
