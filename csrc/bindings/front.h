// The hot path's entry; see front.cpp.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bindings/signals.h"
#include "comm/communicator.h"

namespace ringreduce {

/// From now on exact instances of `type` may go the short way. `exchange_table`: the type's capsule
/// of DLPack's exchange functions, or None for the buffer protocol. `is_lazy`, `mark_written`: see
/// KnownType.
void learn_type(nanobind::handle type, nanobind::object exchange_table, nanobind::object is_lazy,
                nanobind::object mark_written);

/// Where x lies, as its type says; borrowed. False: its type is unknown, or its memory is not plain
/// (lazy, complex, sparse).
bool look_at(nanobind::handle x, nanobind::dlpack::dltensor& tensor);

/// allreduce in place, blocking. False: x is not plain, and nothing was done.
bool allreduce_plain(Communicator& communicator, nanobind::handle x, Op op);

}  // namespace ringreduce
