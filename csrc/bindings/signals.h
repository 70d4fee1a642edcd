// Waiting without the GIL, while Python's signal handlers still run: so Ctrl-C works.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>

#include "base/error.h"
#include "comm/work.h"

namespace ringreduce {

/// Runs signal handlers during one wait and keeps what they raise. Python runs them on the main
/// thread only.
class Signals {
 public:
  Interrupted asker() {
    return [this] {
      nanobind::gil_scoped_acquire gil;
      if (PyErr_CheckSignals() == 0) return false;
      raised_.emplace();
      return true;
    };
  }

  /// Calls `function` without the GIL; raises what a signal handler raised in place of the core's
  /// error.
  template <class Function>
  auto guard(Function function) {
    try {
      nanobind::gil_scoped_release no_gil;
      return function();
    } catch (const Error& error) {
      if (error.code() == ErrorCode::interrupted && raised_) throw std::move(*raised_);
      throw;
    }
  }

 private:
  std::optional<nanobind::python_error> raised_;
};

}  // namespace ringreduce
