#include "shm/cores.h"

#include <sched.h>

#include <algorithm>
#include <bit>
#include <fstream>
#include <limits>

namespace ringreduce {
namespace {

constexpr int no_quota = std::numeric_limits<int>::max();

/// Microseconds of run time per period.
int cores_of(double quota_us, double period_us) {
  if (quota_us <= 0 || period_us <= 0) return no_quota;
  return std::max(1, static_cast<int>(quota_us / period_us));
}

/// "max 100000" or "150000 100000".
int quota_in(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  std::string quota;
  double period_us = 0;
  if (!(file >> quota >> period_us) || quota == "max") return no_quota;
  return cores_of(std::stod(quota), period_us);
}

/// As containers have it on hosts with version 1, whose quota is -1 for none.
int quota_of_version_1() {
  std::ifstream quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double quota_us = 0, period_us = 0;
  return quota >> quota_us && period >> period_us ? cores_of(quota_us, period_us) : no_quota;
}

}  // namespace

std::string affinity_mask() {
  // The kernel refuses a mask too small for the machine, as a cpu_set_t of 1024 processors may be;
  // Linux has no more than these.
  constexpr size_t most_processors = 8192;
  std::string mask(most_processors / 8, '\0');
  sched_getaffinity(0, mask.size(), reinterpret_cast<cpu_set_t*>(mask.data()));
  return mask;
}

int cores_in_union(const std::string* masks, int num_masks) {
  std::string all;
  for (int mask = 0; mask < num_masks; ++mask) {
    all.resize(std::max(all.size(), masks[mask].size()));
    for (size_t byte = 0; byte < masks[mask].size(); ++byte) all[byte] |= masks[mask][byte];
  }
  int cores = 0;
  for (const char bits : all) cores += std::popcount(static_cast<unsigned char>(bits));
  return std::max(cores, 1);
}

int cgroup_quota() {
  // Version 2: one line "0::/path". Every folder on the way up may have its own limit.
  std::ifstream file("/proc/self/cgroup");
  std::string line, path;
  while (std::getline(file, line)) {
    if (line.rfind("0::", 0) == 0) path = line.substr(3);
  }
  int quota = std::min(quota_of_version_1(), quota_in("/sys/fs/cgroup"));
  while (path.size() > 1) {
    quota = std::min(quota, quota_in("/sys/fs/cgroup" + path));
    path.resize(path.rfind('/'));
  }
  return quota;
}

}  // namespace ringreduce
