#include "shm/group.h"

#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>
#include <new>

#include "shm/life.h"

namespace ringreduce {
namespace {

constexpr int64_t interrupt_period_ns = 50'000'000;
constexpr size_t group_offset_bytes = (sizeof(RankControl) + 4095) / 4096 * 4096;

std::string name_rank(const RankControl& control, int rank) {
  return "rank " + std::to_string(rank) + " (pid " + std::to_string(control.pid.load()) + ")";
}

/// 'T' for a stopped process; 0 if unknown (another pid namespace, no /proc).
char process_state(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text{std::istreambuf_iterator<char>(file), {}};
  const size_t end = text.rfind(')');
  return end != std::string::npos && end + 2 < text.size() ? text[end + 2] : '\0';
}

/// The number of the last collective that the rank has come to, modulo 2^31; 0: none yet.
uint32_t last_seen(const RankControl& control) {
  const uint32_t even = control.arrivals[0].flag.value(), odd = control.arrivals[1].flag.value();
  return ((odd - even) & 0x7fffffffu) < 0x40000000u ? odd : even;
}

uint64_t random_nonce() {
  uint64_t nonce = 0;
  if (getrandom(&nonce, sizeof(nonce), 0) != sizeof(nonce)) nonce = static_cast<uint64_t>(now_ns());
  return nonce | 1;
}

}  // namespace

Group::Group(Node& node, bool in_process, Deadline deadline)
    : rank_(node.local_rank()),
      size_(node.local_size()),
      in_process_(in_process),
      claims_(node.local_size() > node.cores()),
      pid_(getpid()),
      segment_(node.create_segment(group_offset_bytes + sizeof(GroupControl), deadline)) {
  // Fresh pages are zero, which is the initial state of everything but the mutex.
  new (&own()) RankControl;
  if (rank_ == 0) new (&shared()) GroupControl;
  const uint64_t nonce = random_nonce();
  own().pid.store(pid_, std::memory_order_relaxed);
  own().nonce.store(nonce, std::memory_order_relaxed);
  if (!in_process_) hold_for_life(&own().life);
  std::vector<std::string> nonces;
  try {
    nonces = node.exchange(std::to_string(nonce), deadline);
  } catch (...) {
    depart();
    throw;
  }
  for (int peer = 0; peer < size_; ++peer) {
    if (std::to_string(control(peer).nonce.load()) != nonces[static_cast<size_t>(peer)]) {
      throw Error(ErrorCode::resource, "ranks of one host do not see each other's shared memory");
    }
  }
}

Group::~Group() { depart(); }

RankControl& Group::control(int rank) const {
  return *reinterpret_cast<RankControl*>(segment_.block(rank));
}

GroupControl& Group::shared() const {
  return *reinterpret_cast<GroupControl*>(segment_.block(0) + group_offset_bytes);
}

void Group::abort(ErrorCode code, int culprit, const std::string& reason) {
  if (aborted()) return;
  // Two threads of one rank may abort at once (a wait's watch, and a user's exception): one of them
  // writes.
  static std::mutex writers;
  std::lock_guard lock(writers);
  if (aborted()) return;
  char* text = own().reason;
  const size_t length = std::min(reason.size(), sizeof(own().reason) - 1);
  std::memcpy(text, reason.data(), length);
  text[length] = '\0';
  const uint64_t word = static_cast<uint64_t>(code) << 48 | static_cast<uint64_t>(rank_ + 1) << 24 |
                        static_cast<uint64_t>(culprit + 1);
  uint64_t none = 0;
  shared().abort_word.compare_exchange_strong(none, word, std::memory_order_acq_rel);
}

AbortRecord Group::abort_record() const {
  const uint64_t word = shared().abort_word.load(std::memory_order_acquire);
  AbortRecord record;
  if (word == 0) return record;
  record.code = static_cast<ErrorCode>(word >> 48);
  record.detector = std::clamp(static_cast<int>(word >> 24 & 0xffffff) - 1, 0, size_ - 1);
  record.culprit = static_cast<int>(word & 0xffffff) - 1;
  const char* text = control(record.detector).reason;
  record.reason.assign(text, strnlen(text, sizeof(RankControl::reason)));
  return record;
}

void Group::depart() {
  // A forked child shares the memory, but is not the rank: it has nothing to say here.
  if (getpid() != pid_ || departed_.exchange(true)) return;
  own().departed.store(1, std::memory_order_release);
  if (!in_process_) release_life(&own().life);
}

bool Group::dead(int rank) const { return !in_process_ && died(&control(rank).life); }

bool Group::all_reported() const {
  for (int peer = 0; peer < size_; ++peer) {
    const RankControl& other = control(peer);
    if (other.reported.load(std::memory_order_acquire) == 0 &&
        other.departed.load(std::memory_order_acquire) == 0 && !dead(peer)) {
      return false;
    }
  }
  return true;
}

bool GroupWatch::stop() {
  const int64_t now = now_ns();
  if (begin_ns_ == 0) {
    begin_ns_ = now;
    next_interrupt_ns_ = now + interrupt_period_ns;
  }
  if (group_.aborted() || check_peers() || check_user(now)) return true;
  check_time(now);
  return group_.aborted();
}

bool GroupWatch::check_user(int64_t now) {
  const std::string me = "rank " + std::to_string(group_.rank());
  if (closing_.load(std::memory_order_relaxed)) {
    group_.abort(ErrorCode::peer_failed, group_.rank(),
                 me + " closed the communicator during " + header_.describe());
    return true;
  }
  if (!interrupted_ || now < next_interrupt_ns_) return false;
  next_interrupt_ns_ = now + interrupt_period_ns;
  if (!interrupted_()) return false;
  group_.abort(ErrorCode::interrupted, group_.rank(), me + " was interrupted while it waited");
  return true;
}

bool GroupWatch::check_peers() {
  for (int peer = 0; peer < group_.size(); ++peer) {
    const RankControl& control = group_.control(peer);
    if (group_.dead(peer)) {
      group_.abort(ErrorCode::peer_failed, peer,
                   name_rank(control, peer) + " died (killed, crashed, or left without clean-up)");
      return true;
    }
    // In this order: whoever departed after it came here has done its part.
    if (control.departed.load(std::memory_order_acquire) != 0 &&
        !has_come(control, header_.sequence)) {
      group_.abort(ErrorCode::peer_failed, peer,
                   name_rank(control, peer) + " exited while others wait for it");
      return true;
    }
  }
  return false;
}

void GroupWatch::check_time(int64_t now) {
  const double waited_s = static_cast<double>(now - begin_ns_) * 1e-9;
  if (!warned_ && waited_s >= limits_.warn_after_s) {
    warned_ = true;
    std::fprintf(stderr, "ringreduce: rank %d has waited %g s in %s #%llu: %s\n", group_.rank(),
                 limits_.warn_after_s, header_.describe().c_str(),
                 static_cast<unsigned long long>(header_.sequence), missing().c_str());
    std::fflush(stderr);
  }
  if (waited_s >= limits_.end_after_s) {
    char seconds[32];
    std::snprintf(seconds, sizeof(seconds), "%g", limits_.end_after_s);
    group_.abort(ErrorCode::timeout, -1,
                 std::string("no end after ") + seconds + " s: " + missing());
  }
}

/// Who has not come, what it did last, and whether it is stopped. Ranks that came are not named
/// unless none is missing.
std::string GroupWatch::missing() const {
  std::string late, present;
  for (int peer = 0; peer < group_.size(); ++peer) {
    const RankControl& control = group_.control(peer);
    const char state = process_state(control.pid.load());
    const std::string stopped = state == 'T' || state == 't' ? ", its process is stopped" : "";
    if (!has_come(control, header_.sequence)) {
      const uint32_t last = last_seen(control);
      const std::string seen = last == 0 ? "it has called nothing yet"
                                         : "it was last seen in " +
                                               control.headers[last & 1].load().describe() + " #" +
                                               std::to_string(last);
      late += (late.empty() ? "" : "; ") + name_rank(control, peer) + " has not come (" + seen +
              stopped + ")";
    } else if (!stopped.empty()) {
      present += (present.empty() ? "" : "; ") + name_rank(control, peer) + " has come, but" +
                 stopped.substr(1);
    }
  }
  if (!late.empty() && !present.empty()) return late + "; " + present;
  if (!late.empty()) return late;
  return present.empty() ? "all ranks have come, but not all have finished" : present;
}

}  // namespace ringreduce
