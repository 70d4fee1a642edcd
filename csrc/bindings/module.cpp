// The extension module ringreduce._core: a contents page. Everything here converts arguments and
// errors; what happens is decided below, in comm/.
#include <nanobind/nanobind.h>

#include "bindings/bindings.h"

NB_MODULE(_core, m) {
  // Objects kept by a reference cycle of the user's are no leak of ours.
  nanobind::set_leak_warnings(false);
  m.doc() = "The native core of ringreduce. Use the package's functions instead.";
  ringreduce::register_errors(m);
  ringreduce::register_words(m);
  ringreduce::register_trace(m);  // before what takes one
  ringreduce::register_mpi(m);
  ringreduce::register_communicator(m);
  ringreduce::register_shortcut(m);
  ringreduce::register_packing(m);
  ringreduce::register_simulation(m);
  ringreduce::register_cluster_simulation(m);
}
