// The extension module ringreduce._core: a contents page. Everything here converts arguments and
// errors; what happens is decided below, in comm/.
#include <nanobind/nanobind.h>

#include "bindings/bindings.h"

NB_MODULE(_core, m) {
  m.doc() = "The native core of ringreduce. Use the package's functions instead.";
  ringreduce::register_errors(m);
  ringreduce::register_words(m);
  ringreduce::register_communicator(m);
}
