// Waiting without the GIL, while Python's signal handlers still run: so Ctrl-C works.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <type_traits>
#include <utility>

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
  /// error, and of the result of a wait that has ended well all the same.
  template <class Function>
  auto guard(Function function) {
    const auto without_gil = [&] {
      const nanobind::gil_scoped_release no_gil;
      return function();
    };
    try {
      if constexpr (std::is_void_v<decltype(function())>) {
        without_gil();
        raise();
      } else {
        auto result = without_gil();
        raise();
        return result;
      }
    } catch (const Error&) {
      raise();
      throw;
    }
  }

 private:
  void raise() {
    if (raised_) throw std::move(*raised_);
  }

  std::optional<nanobind::python_error> raised_;
};

}  // namespace ringreduce
