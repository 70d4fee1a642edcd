// Communicator and Work for Python. Waits release the GIL; signals are looked at while waiting, so
// Ctrl-C works.
#include "comm/communicator.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <deque>
#include <optional>

#include "bindings/bindings.h"
#include "bindings/front.h"
#include "bindings/signals.h"

namespace nb = nanobind;

namespace ringreduce {
namespace {

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

/// On the device, too. Then nothing uses the operands any more, and wait() does not wait.
bool ended(Work& work) {
  if (!work.done()) return false;
  try {
    return !work.event || work.event->done();
  } catch (const Error&) {
    return true;  // the device failed: nothing is under way on it any more
  }
}

/// What Python holds: the communicator, and the objects whose memory operations under way use. The
/// latter are released on Python's threads only, since the progress thread must not touch them.
struct PyCommunicator {
  std::unique_ptr<Communicator> communicator;
  std::deque<std::pair<std::shared_ptr<Work>, nb::object>> kept;

  ~PyCommunicator() {
    communicator->close();
    for (auto& [work, object] : kept) {
      if (!ended(*work)) object.release();  // still in use: better never freed than too early
    }
  }

  void release_finished() {
    while (!kept.empty() && ended(*kept.front().first)) {
      // Out of the queue first: an object that dies may run Python code that comes back here.
      const auto finished = std::move(kept.front());
      kept.pop_front();
    }
  }
};

struct PyWork {
  std::shared_ptr<Work> work;
  nb::object communicator;
};

Layout layout(nb::handle shape, nb::handle strides, Dtype dtype) {
  Layout result;
  result.shape = nb::cast<std::vector<int64_t>>(shape);
  if (!strides.is_none()) result.strides_bytes = nb::cast<std::vector<int64_t>>(strides);
  result.item_bytes = size_of(dtype);
  return result;
}

/// (input address, output address, shape, input strides or None, output strides or None). A
/// reduce_scatter's output has another first dimension than its input: this rank's rows.
Tensor tensor(nb::tuple fields, const Call& call, const Communicator& communicator) {
  Tensor result;
  result.input = reinterpret_cast<const char*>(nb::cast<uintptr_t>(fields[0]));
  result.output = reinterpret_cast<char*>(nb::cast<uintptr_t>(fields[1]));
  result.input_layout = layout(fields[2], fields[3], call.dtype);
  result.output_layout = layout(fields[2], fields[4], call.dtype);
  if (call.kind == Kind::reduce_scatter) {
    const auto rank = static_cast<size_t>(communicator.core().rank);
    const std::vector<size_t> offsets = split_rows(
        static_cast<size_t>(result.input_layout.shape.at(0)), 1, communicator.core().size);
    result.output_layout.shape[0] = static_cast<int64_t>(offsets[rank + 1] - offsets[rank]);
  }
  return result;
}

nb::object submit(nb::object self, int kind, int op, int dtype, int root, nb::list tensors,
                  nb::object keepalive, bool asynchronous, int device, uintptr_t stream,
                  nb::list rows) {
  PyCommunicator& owner = nb::cast<PyCommunicator&>(self);
  Communicator& communicator = *owner.communicator;
  Call call;
  call.kind = static_cast<Kind>(kind);
  call.op = static_cast<Op>(op);
  call.dtype = static_cast<Dtype>(dtype);
  call.root = root;
  call.device = device;
  call.stream = reinterpret_cast<void*>(stream);
  for (nb::handle each : rows) call.rows.push_back(nb::cast<size_t>(each));
  call.tensors.reserve(tensors.size());
  for (nb::handle fields : tensors) {
    call.tensors.push_back(tensor(nb::cast<nb::tuple>(fields), call, communicator));
  }
  Signals signals;
  std::shared_ptr<Work> work;
  signals.guard([&] {
    if (asynchronous) {
      work = communicator.start(std::move(call));
    } else {
      work = std::make_shared<Work>();
      communicator.run(call, *work, signals.asker());
      work->finish(nullptr);
    }
  });
  owner.release_finished();  // now: a barrier may be the last call for long
  if (asynchronous) owner.kept.emplace_back(work, keepalive);
  return nb::cast(PyWork{work, self});
}

/// Of a call on a GPU: until it is enqueued; then `stream`, if given, waits for its end. With a
/// timeout this thread waits for the end, too.
void wait_for(PyWork& self, std::optional<double> timeout_s, std::optional<uintptr_t> stream) {
  PyCommunicator& owner = nb::cast<PyCommunicator&>(self.communicator);
  const Deadline deadline = timeout_s ? Deadline::after_s(*timeout_s) : Deadline::never();
  Signals signals;
  const bool ended = signals.guard([&] {
    if (!owner.communicator->wait(*self.work, deadline, signals.asker())) return false;
    const std::shared_ptr<cuda::Event>& event = self.work->event;
    if (!event) return true;
    if (stream) event->hold_back(reinterpret_cast<void*>(*stream));
    return !timeout_s || owner.communicator->wait(*event, deadline, signals.asker());
  });
  if (!ended) {
    PyErr_Format(PyExc_TimeoutError,
                 "the operation has not ended within the wait's timeout; it goes on, and may be "
                 "waited for again");
    throw nb::python_error();
  }
  owner.release_finished();
}

/// What an array holds so that the memory which it shows stays.
template <class Owner>
nb::capsule capsule_of(std::shared_ptr<Owner> owner) {
  auto* kept = new std::shared_ptr<Owner>(std::move(owner));
  return nb::capsule(
      kept, [](void* pointer) noexcept { delete static_cast<std::shared_ptr<Owner>*>(pointer); });
}

nb::object output(PyWork& self) {
  const std::shared_ptr<char[]>& data = self.work->output;
  return nb::cast(Bytes(data.get(), {self.work->output_bytes}, capsule_of(data)));
}

nb::object allocate(PyCommunicator& self, size_t size_bytes, int device) {
  Signals signals;
  std::shared_ptr<Block> block = signals.guard(
      [&] { return self.communicator->allocate(size_bytes, device, signals.asker()); });
  char* data = block->data();
  const nb::capsule owner = capsule_of(std::move(block));
  if (device < 0) return nb::cast(Bytes(data, {size_bytes}, owner));
  using DeviceBytes = nb::ndarray<nb::device::cuda, uint8_t, nb::ndim<1>>;
  return nb::cast(DeviceBytes(data, {size_bytes}, owner, {}, nb::dtype<uint8_t>(),
                              nb::device::cuda::value, device));
}

Algorithm algorithm_named(const std::string& name) {
  for (size_t index = 0; index < std::size(algorithm_names); ++index) {
    if (name == algorithm_names[index]) return static_cast<Algorithm>(index);
  }
  throw Error(ErrorCode::invalid,
              "unknown algorithm '" + name + "': use auto, one_shot, two_shot, ring or tree");
}

void construct(PyCommunicator* self, int rank, int size, nb::callable exchange, bool in_process,
               double timeout_s, double warn_after_s, const std::string& algorithm,
               const std::string& name, std::shared_ptr<Trace> trace, const std::string& host,
               nb::object open_network, Measured measured) {
  Options options{in_process, timeout_s, warn_after_s,     algorithm_named(algorithm),
                  name,       host,      std::move(trace), std::move(measured)};
  OpenNetwork native_network;
  if (!open_network.is_none()) {
    native_network = [&open_network] {
      nb::gil_scoped_acquire gil;
      const auto [library, number] = nb::cast<std::pair<MpiLibrary, int>>(open_network());
      return Network{load_mpi(library), number};
    };
  }
  const Exchange native_exchange = [&exchange, size](const std::string& message) {
    nb::gil_scoped_acquire gil;
    nb::list answers = nb::cast<nb::list>(exchange(nb::bytes(message.data(), message.size())));
    if (static_cast<int>(answers.size()) != size) {
      throw Error(ErrorCode::invalid, "exchange() must return one message per rank");
    }
    std::vector<std::string> messages;
    for (nb::handle answer : answers) {
      nb::bytes bytes = nb::cast<nb::bytes>(answer);
      messages.emplace_back(bytes.c_str(), bytes.size());
    }
    return messages;
  };
  std::unique_ptr<Communicator> communicator;
  {
    nb::gil_scoped_release no_gil;
    communicator =
        std::make_unique<Communicator>(rank, size, native_exchange, options, native_network);
  }
  new (self) PyCommunicator{std::move(communicator), {}};
}

nb::dict window_info(PyCommunicator& self) {
  const Core& core = self.communicator->core();
  nb::dict info;
  info["cores"] = core.node.cores();
  info["nodes"] = core.node.num_nodes();
  info["slices"] =
      core.group.claims() ? "claimed (ranks outnumber cores)" : "owned (a core per rank)";
  info["staging_bytes"] = Window::staging_bytes(core.group);
  info["chunk_bytes"] = core.window.chunk_bytes();
  info["wire_bytes"] = core.wire ? ShmWire::segment_bytes() : size_t{0};
  info["symmetric_segments"] = core.arena->num_segments();
  info["symmetric_bytes"] = core.arena->segment_bytes();
  return info;
}

nb::object gpu_info(PyCommunicator& self) {
  const std::shared_ptr<Accelerator> open = self.communicator->core().accelerator();
  if (!open) return nb::none();
  nb::dict info;
  info["device"] = open->device;
  info["path"] = open->kernels() ? "kernels" : open->direct() ? "direct" : "host";
  info["why"] = open->why_host();
  info["blocks"] = open->gpu().blocks();
  info["slab_bytes"] = open->gpu().slab_bytes();
  info["symmetric_bytes"] = open->arena()->segment_bytes();
  return info;
}

bool is_symmetric(PyCommunicator& self, uintptr_t address, size_t size_bytes) {
  const Core& core = self.communicator->core();
  const void* data = reinterpret_cast<void*>(address);
  if (core.arena->locate(data, size_bytes).segment != 0) return true;
  const std::shared_ptr<Accelerator> open = core.accelerator();
  return open && open->arena()->locate(data, size_bytes).segment != 0;
}

std::string choice(PyCommunicator& self, int kind, size_t message_bytes) {
  return name_of(self.communicator->core().tuner.choose(static_cast<Kind>(kind), message_bytes));
}

/// Of an allreduce of so many bytes of float32: (algorithm, segments, bytes of a chunk, seconds).
nb::tuple forecast(PyCommunicator& self, size_t message_bytes) {
  const Core& core = self.communicator->core();
  const int local_size = core.node.local_size();
  const Forecast found = core.tuner.forecast(
      message_bytes, core.cluster ? core.cluster->shape() : NodesShape{1, local_size, local_size});
  return nb::make_tuple(found.algorithm, found.segments, found.chunk_bytes, found.time_s);
}

nb::dict constants(PyCommunicator& self) {
  nb::dict values;
  for (const ConstantName& each : constant_names) {
    values[each.name] = self.communicator->core().tuner.constants().*each.value;
  }
  return values;
}

/// allreduce_plain, and what comes after every call.
bool reduce_plain(PyCommunicator& self, nb::handle x, nb::handle op) {
  const bool done = allreduce_plain(*self.communicator, x, op);
  if (done) self.release_finished();
  return done;
}

/// The world while it is open, then nothing. Leaked: no destructor may run after the interpreter's
/// end.
nb::object& world() {
  static auto* const object = new nb::object;
  return *object;
}

/// As reduce_plain; false also where there is no world. Python then need not look it up.
bool allreduce_in_world(nb::handle x, nb::handle op) {
  const nb::object held = world();  // another thread may shut it down meanwhile
  return held && reduce_plain(*nb::inst_ptr<PyCommunicator>(held), x, op);
}

void drain(PyCommunicator& self, double timeout_s) {
  Signals signals;
  const bool ended =
      signals.guard([&] { return self.communicator->drain(timeout_s, signals.asker()); });
  if (!ended) {
    PyErr_SetString(PyExc_TimeoutError, "operations are still under way");
    throw nb::python_error();
  }
  self.release_finished();
}

}  // namespace

void register_communicator(nb::module_& m) {
  m.def("learn_type", &learn_type, nb::arg("type"), nb::arg("exchange_table").none(),
        nb::arg("is_lazy").none(), nb::arg("mark_written").none());
  m.def("learn_profiler", &learn_profiler, nb::arg("globals"));

  nb::class_<PyWork>(m, "Work")
      .def("wait", &wait_for, nb::arg("timeout_s") = nb::none(), nb::arg("stream") = nb::none())
      .def("done", [](PyWork& self) { return ended(*self.work); })
      .def("output", &output)
      .def("times_ns",
           [](PyWork& self) { return std::pair(self.work->begin_ns, self.work->end_ns); })
      .def_prop_ro("counts", [](PyWork& self) { return self.work->counts; });

  m.def(
      "learn_world",
      [](nb::object opened) {
        if (!opened.is_none()) nb::cast<PyCommunicator&>(opened);  // raises for anything else
        world() = opened.is_none() ? nb::object() : std::move(opened);
      },
      nb::arg("world").none());
  m.def("allreduce_in_world", &allreduce_in_world, nb::arg().none(), nb::arg().none());

  const auto core = [](PyCommunicator& self) -> Core& { return self.communicator->core(); };
  nb::class_<PyCommunicator>(m, "Communicator", nb::is_weak_referenceable())
      .def("__init__", &construct, nb::arg("rank"), nb::arg("size"), nb::arg("exchange"),
           nb::kw_only(), nb::arg("in_process"), nb::arg("timeout_s"), nb::arg("warn_after_s"),
           nb::arg("algorithm"), nb::arg("name"), nb::arg("trace"), nb::arg("host") = "",
           nb::arg("open_network") = nb::none(), nb::arg("measured") = Measured{})
      .def_prop_ro("rank", [core](PyCommunicator& self) { return core(self).rank; })
      .def_prop_ro("size", [core](PyCommunicator& self) { return core(self).size; })
      .def_prop_ro("local_rank",
                   [core](PyCommunicator& self) { return core(self).node.local_rank(); })
      .def_prop_ro("local_size",
                   [core](PyCommunicator& self) { return core(self).node.local_size(); })
      .def_prop_ro("node", [core](PyCommunicator& self) { return core(self).node.node(); })
      .def_prop_ro("closed", [](PyCommunicator& self) { return self.communicator->closed(); })
      .def_prop_ro("aborted", [core](PyCommunicator& self) { return core(self).group.aborted(); })
      .def_prop_ro("sequence", [core](PyCommunicator& self) { return core(self).sequence.load(); })
      .def("submit", &submit, nb::arg("kind"), nb::arg("op"), nb::arg("dtype"), nb::arg("root"),
           nb::arg("tensors"), nb::arg("keepalive").none(), nb::arg("asynchronous"),
           nb::arg("device") = -1, nb::arg("stream") = 0, nb::arg("rows") = nb::list())
      .def("allreduce_plain", &reduce_plain, nb::arg().none(), nb::arg().none())
      .def("allocate", &allocate, nb::arg("size_bytes"), nb::arg("device") = -1)
      .def("is_symmetric", &is_symmetric)
      .def("check", [](PyCommunicator& self) { self.communicator->check(); })
      .def("abort", [](PyCommunicator& self,
                       const std::string& reason) { self.communicator->abort(reason); })
      .def("close", [](PyCommunicator& self) { self.communicator->close(); })
      .def("drain", &drain)
      .def("mark_reported", [](PyCommunicator& self) { self.communicator->mark_reported(); })
      .def("all_reported", [](PyCommunicator& self) { return self.communicator->all_reported(); })
      .def("window_info", &window_info)
      .def("gpu_info", &gpu_info)
      .def("choice", &choice)
      .def("forecast", &forecast)
      .def("constants", &constants);
}

}  // namespace ringreduce
