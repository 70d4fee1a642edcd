// The core's Error becomes the matching class of ringreduce.errors.
#include <cstring>

#include "base/error.h"
#include "bindings/bindings.h"

namespace nb = nanobind;

namespace ringreduce {
namespace {

const char* class_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::mismatch:
      return "MismatchError";
    case ErrorCode::timeout:
      return "CollectiveTimeout";
    case ErrorCode::peer_failed:
      return "PeerFailed";
    case ErrorCode::closed:
      return "NotInitialized";
    case ErrorCode::resource:
      return "ResourceError";
    default:
      return "RingReduceError";
  }
}

/// A peer's reason may be cut within a character, and hold what is no text at all.
void set_error(nb::handle kind, const char* text) {
  const auto length = static_cast<Py_ssize_t>(std::strlen(text));
  const nb::object message = nb::steal(PyUnicode_DecodeUTF8(text, length, "replace"));
  if (message) PyErr_SetObject(kind.ptr(), message.ptr());
}

}  // namespace

void register_errors(nb::module_&) {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const Error& error) {
      if (error.code() == ErrorCode::invalid) {
        set_error(PyExc_ValueError, error.what());
      } else if (error.code() == ErrorCode::interrupted) {
        set_error(PyExc_KeyboardInterrupt, error.what());
      } else {
        set_error(nb::module_::import_("ringreduce.errors").attr(class_of(error.code())),
                  error.what());
      }
    }
  });
}

}  // namespace ringreduce
