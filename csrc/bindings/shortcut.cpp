// A Python function with a C function at its door, which tries the short way first: beside a
// collective of a microsecond, the frame of a Python function takes a tenth.
#include <nanobind/stl/string.h>

#include <string>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace ringreduce {
namespace {

/// Of `allreduce_`, the one function that has it. Leaked: modules outlive the interpreter's order
/// of destruction.
struct Shortcut {
  PyObject* general;    // the Python function
  PyObject* short_way;  // (x, op): whether that was all
  PyObject* sum;        // op, if the caller does not say
  PyObject* op_keyword;
  std::string name, doc;
  PyMethodDef definition;
};
Shortcut* shortcut = nullptr;

/// The op of a call with nothing but x and op; null for others.
PyObject* op_of(PyObject* const* arguments, Py_ssize_t positional, PyObject* keywords) {
  const Py_ssize_t named = keywords == nullptr ? 0 : PyTuple_Size(keywords);
  if (positional == 1 && named == 0) return shortcut->sum;
  if (positional == 2 && named == 0) return arguments[1];
  const bool op = positional == 1 && named == 1;
  return op && PyTuple_GetItem(keywords, 0) == shortcut->op_keyword ? arguments[1] : nullptr;
}

PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t positional, PyObject* keywords) {
  if (PyObject* const op = op_of(arguments, positional, keywords)) {
    PyObject* const operands[] = {arguments[0], op};
    PyObject* const done = PyObject_Vectorcall(shortcut->short_way, operands, 2, nullptr);
    if (done == nullptr) return nullptr;
    const bool was_all = done == Py_True;
    Py_DECREF(done);
    if (was_all) return Py_NewRef(arguments[0]);
  }
  return PyObject_Vectorcall(shortcut->general, arguments, static_cast<size_t>(positional),
                             keywords);
}

std::string text_of(nb::handle function, const char* attribute) {
  const nb::object text = function.attr(attribute);
  return text.is_none() ? "" : nb::cast<std::string>(text);  // python -OO has no docstrings
}

}  // namespace

void register_shortcut(nb::module_& m) {
  m.def(
      "shortcut",
      [](nb::callable short_way, nb::callable general, const std::string& signature) {
        const std::string name = text_of(general, "__name__");
        shortcut = new Shortcut{general.inc_ref().ptr(),
                                short_way.inc_ref().ptr(),
                                PyUnicode_InternFromString("sum"),
                                PyUnicode_InternFromString("op"),
                                name,
                                // What inspect reads a signature from.
                                name + signature + "\n--\n\n" + text_of(general, "__doc__"),
                                {}};
        shortcut->definition = {shortcut->name.c_str(),
                                reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call)),
                                METH_FASTCALL | METH_KEYWORDS, shortcut->doc.c_str()};
        return nb::steal(PyCFunction_NewEx(&shortcut->definition, nullptr,
                                           nb::object(general.attr("__module__")).ptr()));
      },
      nb::arg("short_way"), nb::arg("general"), nb::arg("signature"));
}

}  // namespace ringreduce
