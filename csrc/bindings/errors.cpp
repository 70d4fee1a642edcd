// The core's Error becomes the matching class of ringreduce.errors.
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

}  // namespace

void register_errors(nb::module_&) {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const Error& error) {
      if (error.code() == ErrorCode::invalid) {
        PyErr_SetString(PyExc_ValueError, error.what());
      } else if (error.code() == ErrorCode::interrupted) {
        PyErr_SetString(PyExc_KeyboardInterrupt, error.what());
      } else {
        PyErr_SetString(
            nb::module_::import_("ringreduce.errors").attr(class_of(error.code())).ptr(),
            error.what());
      }
    }
  });
}

}  // namespace ringreduce
