#include "comm/trace.h"

#include <new>
#include <utility>

namespace ringreduce {

void Trace::start() {
  std::lock_guard lock(mutex_);
  taken_ = {};
  on_.store(true, std::memory_order_relaxed);
}

Trace::Taken Trace::stop() {
  std::lock_guard lock(mutex_);
  on_.store(false, std::memory_order_relaxed);
  return std::exchange(taken_, {});
}

void Trace::add(TraceRecord record) {
  std::lock_guard lock(mutex_);
  if (!on()) return;
  try {
    if (taken_.records.size() >= largest_size) throw std::bad_alloc();
    taken_.records.push_back(std::move(record));
  } catch (const std::bad_alloc&) {
    ++taken_.dropped;  // the collective itself has gone well
  }
}

}  // namespace ringreduce
