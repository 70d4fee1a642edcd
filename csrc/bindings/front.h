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

/// From now on the short way is left to the general one while `_is_profiler_enabled` is True there.
void learn_profiler(nanobind::dict globals);

/// allreduce in place, blocking; `op`: its name. False: x is not plain, `op` is no operation's
/// name, or a profiler runs; nothing was done.
bool allreduce_plain(Communicator& communicator, nanobind::handle x, nanobind::handle op);

}  // namespace ringreduce
