// What else a wait looks at, beside the thing it waits for: aborts, dead peers, deadlines, signals.
#pragma once

namespace ringreduce {

/// stop() is called now and then by a wait, from the waiting thread.
class Watch {
 public:
  virtual ~Watch() = default;
  /// True: leave the wait, it will not end well. Stays true.
  virtual bool stop() = 0;
};

}  // namespace ringreduce
