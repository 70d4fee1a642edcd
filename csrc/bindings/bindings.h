// One function per concept; module.cpp calls them all.
#pragma once

#include <nanobind/nanobind.h>

namespace ringreduce {

void register_errors(nanobind::module_& m);
void register_words(nanobind::module_& m);
void register_trace(nanobind::module_& m);
void register_mpi(nanobind::module_& m);
void register_communicator(nanobind::module_& m);
void register_shortcut(nanobind::module_& m);
void register_packing(nanobind::module_& m);
void register_simulation(nanobind::module_& m);
void register_cluster_simulation(nanobind::module_& m);

}  // namespace ringreduce
