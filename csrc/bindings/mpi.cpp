// What Python reads from mpi4py, on its way to net/.
#include <nanobind/stl/string.h>

#include "bindings/bindings.h"
#include "net/mpi_api.h"

namespace nb = nanobind;

namespace ringreduce {
namespace {

std::string text(nb::bytes bytes) { return {bytes.c_str(), bytes.size()}; }

}  // namespace

void register_mpi(nb::module_& m) {
  nb::class_<MpiLibrary>(m, "MpiLibrary")
      .def(
          "__init__",
          [](MpiLibrary* self, const std::string& path, size_t handle_bytes, size_t status_bytes,
             nb::bytes communicator, nb::bytes byte_type, nb::bytes null_request, int undefined,
             int max_tag, bool ask_for_cuda) {
            new (self) MpiLibrary{path,
                                  handle_bytes,
                                  status_bytes,
                                  text(communicator),
                                  text(byte_type),
                                  text(null_request),
                                  undefined,
                                  max_tag,
                                  ask_for_cuda};
          },
          nb::kw_only(), nb::arg("path"), nb::arg("handle_bytes"), nb::arg("status_bytes"),
          nb::arg("communicator"), nb::arg("byte_type"), nb::arg("null_request"),
          nb::arg("undefined"), nb::arg("max_tag"), nb::arg("ask_for_cuda"))
      .def_ro("path", &MpiLibrary::path)
      .def_ro("handle_bytes", &MpiLibrary::handle_bytes)
      .def_ro("status_bytes", &MpiLibrary::status_bytes);
}

}  // namespace ringreduce
