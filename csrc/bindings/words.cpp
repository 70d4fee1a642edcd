// The numbers behind the names of collectives, operations, dtypes and algorithms; and how this
// build was made.
#include <nanobind/stl/string.h>

#include "base/dtype.h"
#include "base/header.h"
#include "base/op.h"
#include "bindings/bindings.h"
#include "comm/tuner.h"
#include "cuda/gpu.h"
#include "net/wire.h"
#include "reduce/reduce.h"

namespace nb = nanobind;

namespace ringreduce {
namespace {

nb::dict build_info() {
  nb::dict info;
  info["version"] = RR_VERSION;
  info["compiler"] = __VERSION__;
  info["instruction set"] = isa_name();
  return info;
}

nb::dict cuda_info() {
  const cuda::About about = cuda::about();
  nb::dict info;
  info["built"] = about.built;
  info["runtime"] = about.runtime;
  info["devices"] = about.devices;
  info["unavailable"] = about.unavailable;
  return info;
}

}  // namespace

void register_words(nb::module_& m) {
  nb::dict kinds, ops, dtypes;
  nb::list item_bytes;
  for (int kind = 0; kind <= static_cast<int>(Kind::reduce); ++kind) {
    kinds[name_of(static_cast<Kind>(kind))] = kind;
  }
  for (int op = 0; op < num_ops; ++op) ops[name_of(static_cast<Op>(op))] = op;
  for (int dtype = 0; dtype < num_dtypes; ++dtype) {
    dtypes[name_of(static_cast<Dtype>(dtype))] = dtype;
    item_bytes.append(size_of(static_cast<Dtype>(dtype)));
  }
  nb::list algorithms;
  for (const char* name : algorithm_names) algorithms.append(name);
  nb::dict constants;
  for (const ConstantName& each : constant_names) constants[each.name] = Constants{}.*each.value;
  m.attr("CONSTANTS") = constants;  // the source's, where each rank has a core
  m.attr("NETWORK_CHUNK_BYTES") = NetWire::slot_bytes;
  m.attr("NETWORK_LANES") = NetWire::lanes;
  m.attr("KINDS") = kinds;
  m.attr("OPS") = ops;
  m.attr("DTYPES") = dtypes;
  m.attr("ITEM_BYTES") = nb::tuple(item_bytes);  // by the number of the dtype
  m.attr("ALGORITHMS") = nb::tuple(algorithms);
  m.def(
      "supports",
      [](int op, int dtype) { return supports(static_cast<Op>(op), static_cast<Dtype>(dtype)); },
      "Whether an operation is defined for a dtype.");
  m.def("cuda_info", &cuda_info,
        "built: with which CUDA, empty for none. runtime: versions. devices: how many. "
        "unavailable: why there is none.");
  m.def("build_info", &build_info,
        "How this extension was built, and what it found on this machine.");
}

}  // namespace ringreduce
