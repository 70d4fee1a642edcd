// What can go wrong in a collective, as the core's own exception. Algorithms never throw: windows
// and wires turn into no-ops after a failure, and the communicator throws once, when the algorithm
// has returned.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace ringreduce {

enum class ErrorCode : int {
  none = 0,
  mismatch,     // ranks called different collectives; the communicator stays usable
  timeout,      // the deadline passed; the communicator is dead
  peer_failed,  // a rank died, left early or gave up; the communicator is dead
  interrupted,  // a signal handler raised (Ctrl-C); the communicator is dead
  closed,       // used after close, or in a forked child
  resource,     // memory, file descriptors, sockets
  invalid,      // wrong use that the Python layer did not catch
};

/// As in the enumeration; "" for none.
inline const char* name_of(ErrorCode code) {
  constexpr const char* names[] = {"",       "mismatch", "timeout", "peer failed", "interrupted",
                                   "closed", "resource", "invalid"};
  return names[static_cast<int>(code)];
}

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace ringreduce
