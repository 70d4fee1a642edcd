// The short way from a Python object to the core, for the call that counts most: a blocking
// in-place allreduce of a contiguous CPU tensor. Reads the object's memory in one C call (DLPack's
// exchange table, or the buffer protocol) instead of half a dozen attributes. What is not plain is
// left to the general way, which also has the error messages.
#include "bindings/front.h"

#include <nanobind/ndarray.h>

#include <deque>
#include <optional>
#include <vector>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace ringreduce {
namespace {

/// The head of DLPack's exchange table, version 1 (dlpack.h, DLPackExchangeAPI): what a type offers
/// so that others can look at its objects without calling Python.
struct ExchangeTable {
  uint32_t major, minor;
  const ExchangeTable* previous;
  void* allocate;
  void* export_managed;
  void* import_managed;
  int (*view)(void* object, nb::dlpack::dltensor* out);  // borrows; 0 on success
  void* current_stream;
};

/// A type whose exact instances go the short way.
struct KnownType {
  PyTypeObject* type;
  const ExchangeTable* table;  // null: the buffer protocol
  nb::object is_lazy;       // called with the tensor: whether its memory is not its value; or None
  nb::object mark_written;  // called with (tensor,) before its memory changes; or None
};

/// Leaked: modules outlive the interpreter's order of destruction.
/// A deque: one may be in use, in Python code of is_lazy, while another is learned.
std::deque<KnownType>& known_types() {
  static auto* types = new std::deque<KnownType>;
  return *types;
}

/// The globals of torch.autograd.profiler, once torch is in use. Leaked, as above.
PyObject* profiler_globals = nullptr;

/// While torch's profiler runs, calls go the general way, which records them. Reading its flag here
/// takes half of what it takes in Python.
bool profiled() {
  static PyObject* const name = PyUnicode_InternFromString("_is_profiler_enabled");
  return profiler_globals != nullptr && PyDict_GetItem(profiler_globals, name) == Py_True;
}

std::optional<Op> op_named(nb::handle name) {
  static const auto* const names = [] {
    auto* interned = new std::vector<PyObject*>;
    for (int op = 0; op < num_ops; ++op) {
      interned->push_back(PyUnicode_InternFromString(name_of(static_cast<Op>(op))));
    }
    return interned;
  }();
  for (size_t op = 0; op < names->size(); ++op) {
    if (name.ptr() == (*names)[op]) return static_cast<Op>(op);
  }
  if (!PyUnicode_CheckExact(name.ptr())) return std::nullopt;
  for (size_t op = 0; op < names->size(); ++op) {
    if (PyUnicode_Compare(name.ptr(), (*names)[op]) == 0) return static_cast<Op>(op);
  }
  return std::nullopt;
}

struct Plain {
  char* data;
  Dtype dtype;
  const int64_t* shape;
  int dimensions;
};

std::optional<Dtype> dtype_of(nb::dlpack::dtype dtype) {
  using Code = nb::dlpack::dtype_code;
  if (dtype.lanes != 1) return std::nullopt;
  switch (static_cast<Code>(dtype.code)) {
    case Code::Float:
      if (dtype.bits == 64) return Dtype::f64;
      if (dtype.bits == 32) return Dtype::f32;
      if (dtype.bits == 16) return Dtype::f16;
      return std::nullopt;
    case Code::Bfloat:
      return dtype.bits == 16 ? std::optional(Dtype::bf16) : std::nullopt;
    case Code::Int:
      if (dtype.bits == 64) return Dtype::i64;
      if (dtype.bits == 32) return Dtype::i32;
      return std::nullopt;
    default:
      return std::nullopt;
  }
}

std::optional<Dtype> dtype_of(const char* format) {
  if (format == nullptr || format[0] == '\0' || format[1] != '\0') return std::nullopt;
  switch (format[0]) {
    case 'd':
      return Dtype::f64;
    case 'f':
      return Dtype::f32;
    case 'e':
      return Dtype::f16;
    case 'l':
      return sizeof(long) == 8 ? Dtype::i64 : Dtype::i32;
    case 'q':
      return Dtype::i64;
    case 'i':
      return Dtype::i32;
    default:
      return std::nullopt;
  }
}

bool contiguous(const nb::dlpack::dltensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  for (int dimension = tensor.ndim - 1; dimension >= 0; --dimension) {
    if (tensor.shape[dimension] != 1 && tensor.strides[dimension] != expected) return false;
    expected *= tensor.shape[dimension];
  }
  return true;
}

/// Calls use(plain) if the object's memory is plain; false if not, with no Python error set.
template <class Use>
bool with_exchange_table(const KnownType& known, nb::handle x, Use use) {
  nb::dlpack::dltensor tensor;
  if (known.table->view(x.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  const std::optional<Dtype> dtype = dtype_of(tensor.dtype);
  const bool on_cpu = tensor.device.device_type == nb::device::cpu::value;
  char* data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  if (!dtype || !on_cpu || tensor.data == nullptr || !contiguous(tensor)) return false;
  if (reinterpret_cast<uintptr_t>(data) % size_of(*dtype) != 0) return false;
  use(Plain{data, *dtype, tensor.shape, tensor.ndim});
  return true;
}

template <class Use>
bool with_buffer(nb::handle x, Use use) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(x.ptr(), &buffer, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE | PyBUF_FORMAT) !=
      0) {
    PyErr_Clear();
    return false;
  }
  const std::optional<Dtype> dtype = dtype_of(buffer.format);
  static_assert(sizeof(Py_ssize_t) == sizeof(int64_t));
  const auto* shape = reinterpret_cast<const int64_t*>(buffer.shape);
  const bool plain = dtype && reinterpret_cast<uintptr_t>(buffer.buf) % size_of(*dtype) == 0;
  if (plain) {
    // The view is released on every way out, also if the collective throws.
    struct Release {
      Py_buffer* buffer;
      ~Release() { PyBuffer_Release(buffer); }
    } release{&buffer};
    use(Plain{static_cast<char*>(buffer.buf), *dtype, shape, buffer.ndim});
    return true;
  }
  PyBuffer_Release(&buffer);
  return false;
}

/// Kept per thread, so that its memory is allocated once.
struct Kept {
  Call call{Kind::allreduce, Op::sum, Dtype::f32, 0, std::vector<Tensor>(1), 0};
  bool in_use = false;
};

void fill(Call& call, const Plain& plain, Op op) {
  call.op = op;
  call.dtype = plain.dtype;
  Tensor& tensor = call.tensors.front();
  tensor.input = plain.data;
  tensor.output = plain.data;
  for (Layout* layout : {&tensor.input_layout, &tensor.output_layout}) {
    layout->shape.assign(plain.shape, plain.shape + plain.dimensions);
    layout->item_bytes = size_of(plain.dtype);
  }
}

void run_plain(Communicator& communicator, const Plain& plain, Op op) {
  thread_local Kept kept;
  std::optional<Kept> nested;  // of a signal handler that runs within a call
  if (kept.in_use) nested.emplace();
  struct Use {
    Kept& kept;
    explicit Use(Kept& kept) : kept(kept) { kept.in_use = true; }
    ~Use() { kept.in_use = false; }
  } use(nested ? *nested : kept);
  fill(use.kept.call, plain, op);
  Work work;
  Signals signals;
  signals.guard([&] { communicator.run(use.kept.call, work, signals.asker()); });
}

}  // namespace

void learn_type(nb::handle type, nb::object exchange_table, nb::object is_lazy,
                nb::object mark_written) {
  const ExchangeTable* table = nullptr;
  if (!exchange_table.is_none()) {
    table = static_cast<const ExchangeTable*>(
        PyCapsule_GetPointer(exchange_table.ptr(), "dlpack_exchange_api"));
    if (table == nullptr) throw nb::python_error();
    while (table && table->major > 1) table = table->previous;
    if (!table || table->major != 1 || !table->view) return;  // then this type goes the general way
  }
  known_types().push_back({reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()), table,
                           std::move(is_lazy), std::move(mark_written)});
}

bool look_at(nb::handle x, nb::dlpack::dltensor& tensor) {
  for (const KnownType& known : known_types()) {
    if (Py_TYPE(x.ptr()) != known.type || known.table == nullptr) continue;
    if (!known.is_lazy.is_none() && nb::cast<bool>(known.is_lazy(x))) return false;
    if (known.table->view(x.ptr(), &tensor) == 0) {
      // torch has zeros without memory.
      return tensor.data != nullptr && dtype_of(tensor.dtype).has_value();
    }
    PyErr_Clear();
    return false;
  }
  return false;
}

void learn_profiler(nb::dict globals) { profiler_globals = globals.release().ptr(); }

bool allreduce_plain(Communicator& communicator, nb::handle x, nb::handle op_name) {
  const std::optional<Op> op = op_named(op_name);
  if (!op || profiled()) return false;
  for (const KnownType& known : known_types()) {
    if (Py_TYPE(x.ptr()) != known.type) continue;
    if (!known.is_lazy.is_none() && nb::cast<bool>(known.is_lazy(x))) return false;
    const auto run = [&](const Plain& plain) {
      if (!known.mark_written.is_none()) {
        known.mark_written(nb::make_tuple(x));
      }
      run_plain(communicator, plain, *op);
    };
    return known.table ? with_exchange_table(known, x, run) : with_buffer(x, run);
  }
  return false;
}

}  // namespace ringreduce
