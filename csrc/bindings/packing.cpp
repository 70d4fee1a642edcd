// Gradients into a bucket, in one call: reading a tensor's memory from Python costs more than
// copying a small one.
#include <nanobind/ndarray.h>

#include <cstring>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/front.h"
#include "reduce/lines.h"

namespace nb = nanobind;

namespace ringreduce {
namespace {

/// From here on, a copy is out of a core's caches before anybody reads it.
constexpr size_t large_bytes = size_t{4} << 20;

using Memory = nb::dlpack::dltensor;

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
};

char* data_of(const Memory& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

bool same_layout(const Memory& a, const Memory& b) {
  if (a.dtype.code != b.dtype.code || a.dtype.bits != b.dtype.bits || a.ndim != b.ndim)
    return false;
  if (a.device.device_type != nb::device::cpu::value) return false;
  if (b.device.device_type != nb::device::cpu::value) return false;
  if (a.strides == nullptr || b.strides == nullptr) return false;
  for (int dimension = 0; dimension < a.ndim; ++dimension) {
    if (a.shape[dimension] != b.shape[dimension]) return false;
    if (a.shape[dimension] != 1 && a.strides[dimension] != b.strides[dimension]) return false;
  }
  return true;
}

size_t size_bytes(const Memory& tensor) {
  size_t bytes = tensor.dtype.bits / 8;
  for (int dimension = 0; dimension < tensor.ndim; ++dimension) {
    bytes *= static_cast<size_t>(tensor.shape[dimension]);
  }
  return bytes;
}

/// The places of a bucket's gradients, looked at once: they stay where they are.
class Packer {
 public:
  /// Of tensors that are dense and in plain memory, whose shapes and strides the list keeps alive.
  explicit Packer(nb::list targets) : targets_(std::move(targets)), memory_(targets_.size()) {
    for (size_t index = 0; index < memory_.size(); ++index) {
      if (!look_at(targets_[index], memory_[index])) memory_[index].ndim = -1;  // like no other
    }
  }

  /// Copies every source to its target. Returns the indices of those that it left out: what has
  /// another layout, is no real tensor in plain memory, or is the target itself.
  nb::list pack(nb::list sources) const {
    nb::list left;
    std::vector<Copy> copies;
    copies.reserve(memory_.size());
    for (size_t index = 0; index < memory_.size(); ++index) {
      const Memory& to = memory_[index];
      Memory from;
      if (look_at(sources[index], from) && same_layout(from, to) && data_of(from) != data_of(to)) {
        copies.push_back({data_of(to), data_of(from), size_bytes(to)});
      } else {
        left.append(index);
      }
    }
    nb::gil_scoped_release no_gil;
    for (const Copy& copy : copies) {
      if (copy.bytes < large_bytes) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        copy_past_caches(copy.to, copy.from, copy.bytes);
      }
    }
    return left;
  }

 private:
  nb::list targets_;
  std::vector<Memory> memory_;
};

}  // namespace

void register_packing(nb::module_& m) {
  nb::class_<Packer>(m, "Packer")
      .def(nb::init<nb::list>(), nb::arg("targets"))
      .def("pack", &Packer::pack, nb::arg("sources"));
}

}  // namespace ringreduce
