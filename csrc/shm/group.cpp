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
// How long other nodes are given to say which of their ranks is late.
constexpr double answer_limit_s = 1;
constexpr size_t group_offset_bytes = (sizeof(RankControl) + 4095) / 4096 * 4096;

/// 'T' for a stopped process; 0 if unknown (another pid namespace, no /proc).
char process_state(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text{std::istreambuf_iterator<char>(file), {}};
  const size_t end = text.rfind(')');
  return end != std::string::npos && end + 2 < text.size() ? text[end + 2] : '\0';
}

uint64_t random_nonce() {
  uint64_t nonce = 0;
  if (getrandom(&nonce, sizeof(nonce), 0) != sizeof(nonce)) nonce = static_cast<uint64_t>(now_ns());
  return nonce | 1;
}

}  // namespace

std::string host_name() {
  char name[256] = {};
  gethostname(name, sizeof(name) - 1);
  return name;
}

Group::Group(Node& node, bool in_process, Deadline deadline)
    : rank_(node.local_rank()),
      size_(node.local_size()),
      numbers_(node.ranks()),
      in_process_(in_process),
      claims_(node.local_size() > node.cores()),
      pid_(getpid()),
      host_(node.num_nodes() > 1 ? host_name() : ""),
      segment_(node.create_segment(group_offset_bytes + sizeof(GroupControl), deadline)) {
  for (int peer = 0; peer < size_; ++peer) {
    controls_.push_back(reinterpret_cast<RankControl*>(segment_.block(peer)));
  }
  own_ = controls_[static_cast<size_t>(rank_)];
  shared_ = reinterpret_cast<GroupControl*>(segment_.block(0) + group_offset_bytes);
  // Fresh pages are zero, which is the initial state of everything but the mutex.
  new (&own()) RankControl;
  if (rank_ == 0) new (&shared()) GroupControl;
  const uint64_t nonce = random_nonce();
  own().pid.store(pid_, std::memory_order_relaxed);
  own().nonce.store(nonce, std::memory_order_relaxed);
  if (!in_process_) hold_for_life(&own().life);
  try {
    const std::vector<std::string> nonces = node.exchange(std::to_string(nonce), deadline);
    for (int peer = 0; peer < size_; ++peer) {
      if (std::to_string(control(peer).nonce.load()) != nonces[static_cast<size_t>(peer)]) {
        throw Error(ErrorCode::resource, "ranks of one host do not see each other's shared memory");
      }
    }
  } catch (...) {
    depart();  // the life thread must not hold a mutex in memory that is about to be unmapped
    throw;
  }
}

Group::~Group() { depart(); }

void Group::abort(ErrorCode code, int culprit, const std::string& reason) {
  abort({code, culprit, number_of(rank_), reason});
}

void Group::abort_interrupted() {
  const int number = number_of(rank_);
  abort(ErrorCode::interrupted, number,
        "rank " + std::to_string(number) + " was interrupted while it waited");
}

void Group::abort(const AbortRecord& record) {
  if (aborted()) return;
  // Two threads of one rank may abort at once (a wait's watch, and a user's exception): one of them
  // writes.
  static std::mutex writers;
  std::lock_guard lock(writers);
  if (aborted()) return;
  own().culprit = record.culprit;
  own().detector = record.detector;
  char* text = own().reason;
  const size_t length = std::min(record.reason.size(), sizeof(own().reason) - 1);
  std::memcpy(text, record.reason.data(), length);
  text[length] = '\0';
  const uint64_t word = static_cast<uint64_t>(record.code) << 32 | static_cast<uint64_t>(rank_ + 1);
  uint64_t none = 0;
  shared().abort_word.compare_exchange_strong(none, word, std::memory_order_acq_rel);
}

AbortRecord Group::abort_record() const {
  const uint64_t word = shared().abort_word.load(std::memory_order_acquire);
  if (word == 0) return {};
  const int writer = std::clamp(static_cast<int>(word & 0xffffffff) - 1, 0, size_ - 1);
  const RankControl& from = control(writer);
  return {static_cast<ErrorCode>(word >> 32), from.culprit, from.detector,
          std::string(from.reason, strnlen(from.reason, sizeof(from.reason)))};
}

std::string Group::describe(int rank) const {
  return "rank " + std::to_string(number_of(rank)) + " (pid " +
         std::to_string(control(rank).pid.load()) + (host_.empty() ? "" : ", host " + host_) + ")";
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

std::optional<AbortRecord> Group::find_dead() const {
  for (int peer = 0; peer < size_; ++peer) {
    if (!dead(peer)) continue;
    return AbortRecord{ErrorCode::peer_failed, number_of(peer), number_of(rank_),
                       describe(peer) + " died (killed, crashed, or left without clean-up)"};
  }
  return std::nullopt;
}

std::optional<AbortRecord> Group::find_lost(uint64_t sequence) const {
  if (std::optional<AbortRecord> died = find_dead()) return died;
  for (int peer = 0; peer < size_; ++peer) {
    // In this order: whoever departed after it came here has done its part.
    const RankControl& other = control(peer);
    if (other.departed.load(std::memory_order_acquire) == 0 || has_come(other, sequence)) continue;
    return AbortRecord{ErrorCode::peer_failed, number_of(peer), number_of(rank_),
                       describe(peer) + " exited while others wait for it"};
  }
  return std::nullopt;
}

std::string Group::missing(uint64_t sequence) const {
  std::string late, present;
  for (int peer = 0; peer < size_; ++peer) {
    const RankControl& other = control(peer);
    const char state = process_state(other.pid.load());
    const std::string stopped = state == 'T' || state == 't' ? ", its process is stopped" : "";
    if (!has_come(other, sequence)) {
      const uint64_t last = last_seen(other);
      const std::string seen = last == 0 ? "it has called nothing yet"
                                         : "it was last seen in " +
                                               other.headers[last & 1].load().describe() + " #" +
                                               std::to_string(last);
      late +=
          (late.empty() ? "" : "; ") + describe(peer) + " has not come (" + seen + stopped + ")";
    } else if (!stopped.empty()) {
      present +=
          (present.empty() ? "" : "; ") + describe(peer) + " has come, but" + stopped.substr(1);
    }
  }
  return late + (late.empty() || present.empty() ? "" : "; ") + present;
}

AbortRecord timed_out(const Group& group, double after_s, const std::string& why) {
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%g", after_s);
  return {ErrorCode::timeout, -1, group.number_of(group.rank()),
          std::string("timeout after ") + seconds + " s: " + why};
}

bool GroupWatch::stop() {
  const int64_t now = now_ns();
  if (begin_ns_ == 0) {
    begin_ns_ = now;
    next_interrupt_ns_ = now + interrupt_period_ns;
  }
  if (group_.aborted()) return true;
  std::optional<AbortRecord> lost = group_.find_lost(header_.sequence);
  if (!lost && group_.remote()) lost = group_.remote()->find_lost(header_.sequence);
  if (lost) {
    group_.abort(*lost);
    return true;
  }
  if (check_user(now)) return true;
  check_time(now);
  return group_.aborted();
}

bool GroupWatch::check_user(int64_t now) {
  const int number = group_.number_of(group_.rank());
  const std::string me = "rank " + std::to_string(number);
  if (closing_.load(std::memory_order_relaxed)) {
    group_.abort(ErrorCode::peer_failed, number,
                 me + " closed the communicator during " + header_.describe());
    return true;
  }
  if (!interrupted_ || now < next_interrupt_ns_) return false;
  next_interrupt_ns_ = now + interrupt_period_ns;
  if (!interrupted_()) return false;
  group_.abort_interrupted();
  return true;
}

void GroupWatch::check_time(int64_t now) {
  const double waited_s = static_cast<double>(now - begin_ns_) * 1e-9;
  if (!warned_ && waited_s >= limits_.warn_after_s) {
    warned_ = true;
    std::fprintf(stderr, "ringreduce: rank %d has waited %g s in %s #%llu: %s\n",
                 group_.number_of(group_.rank()), limits_.warn_after_s, header_.describe().c_str(),
                 static_cast<unsigned long long>(header_.sequence),
                 why_long(group_.missing(header_.sequence)).c_str());
    std::fflush(stderr);
  }
  if (waited_s < limits_.end_after_s) return;
  const std::string missing = group_.missing(header_.sequence);
  Remote* remote = group_.remote();
  if (remote && missing.empty() && waited_s < limits_.end_after_s + answer_limit_s) {
    if (!asked_) remote->ask(header_.sequence, limits_.end_after_s);
    asked_ = true;
    return;
  }
  group_.abort(timed_out(group_, limits_.end_after_s, why_long(missing)));
}

std::string GroupWatch::why_long(const std::string& missing) const {
  if (!missing.empty()) return missing;
  return group_.remote() ? "all ranks of this host have come"
                         : "all ranks have come, but not all have finished";
}

}  // namespace ringreduce
