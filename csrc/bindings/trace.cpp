// Trace for Python: the records as tuples of plain values.
#include "comm/trace.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace ringreduce {
namespace {

/// (communicator, kind, op, dtype, algorithm, sequence, bytes, on progress thread, begin_ns,
/// met_ns, end_ns, error); the order is that of recording.py.
nb::tuple fields(const TraceRecord& record) {
  return nb::make_tuple(*record.communicator, name_of(record.kind), name_of(record.op),
                        name_of(record.dtype), name_of(record.algorithm), record.sequence,
                        record.bytes, record.on_progress_thread, record.begin_ns, record.met_ns,
                        record.end_ns, name_of(record.error));
}

nb::tuple stop(Trace& trace) {
  const Trace::Taken taken = trace.stop();
  nb::list records;
  for (const TraceRecord& record : taken.records) records.append(fields(record));
  return nb::make_tuple(records, taken.dropped);
}

}  // namespace

void register_trace(nb::module_& m) {
  nb::class_<Trace>(m, "Trace").def(nb::init<>()).def("start", &Trace::start).def("stop", &stop);
}

}  // namespace ringreduce
