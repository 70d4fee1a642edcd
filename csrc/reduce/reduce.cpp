// reduce(): what needs no arithmetic is copied here; the rest goes to the kernel of this dtype and
// op that was built for the best instruction set the CPU has.
#include "reduce/reduce.h"

#include <cassert>
#include <cstring>

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "reduce/isa.h"
#include "reduce/lines.h"

namespace ringreduce {
namespace {

#ifdef __x86_64__

constexpr Isa isas[] = {
    {"x86-64-v4", &v4::kernels},
    {"x86-64-v3", &v3::kernels},
    {"baseline", &baseline::kernels},
};

/// What clang 14 cannot be asked by name.
bool has_f16c_lzcnt_movbe() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  if (!(ecx & bit_F16C) || !(ecx & bit_MOVBE)) return false;
  return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && (ecx & bit_LZCNT);
}

bool has_v3() {
  __builtin_cpu_init();
  return has_f16c_lzcnt_movbe() && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("fma");
}

bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

size_t best_isa() { return has_v4() ? 0 : has_v3() ? 1 : 2; }

#else

constexpr Isa isas[] = {{"baseline", &baseline::kernels}};

size_t best_isa() { return 0; }

#endif

// One source that is already the result: the targets hold its type and no division is due. Not so
// for bool, whose bytes become 0 or 1.
bool is_copy(const Reduction& reduction, std::span<const Target> targets,
             std::span<const Source> sources) {
  if (sources.size() != 1 || reduction.dtype == Dtype::boolean) return false;
  const Format format = sources[0].format;
  const bool divides = reduction.op == Op::avg && reduction.size > 1;
  for (const Target& target : targets) {
    if (size_of(reduction.dtype, target.format) != size_of(reduction.dtype, format)) return false;
    if (divides && target.format == Format::storage) return false;
  }
  return true;
}

}  // namespace

std::span<const Isa> available_isas() {
  static const std::span<const Isa> available = std::span(isas).subspan(best_isa());
  return available;
}

void reduce_with(const Isa& isa, const Reduction& reduction, std::span<const Target> targets,
                 std::span<const Source> sources, size_t count) {
  assert(!sources.empty() && reduction.size >= 1);
  assert(supports(reduction.op, reduction.dtype));
  if (count == 0 || targets.empty()) return;
  if (is_copy(reduction, targets, sources)) {
    const size_t size_bytes = count * size_of(reduction.dtype, sources[0].format);
    for (const Target& target : targets) {
      if (target.data != sources[0].data) memcpy(target.data, sources[0].data, size_bytes);
    }
    if (sources[0].take) take(sources[0].data, size_bytes);
    return;
  }
  const KernelRow& row = isa.kernels->of_dtype[static_cast<size_t>(reduction.dtype)];
  row.of_op[static_cast<size_t>(reduction.op)](reduction, targets.data(), targets.size(),
                                               sources.data(), sources.size(), count);
}

void reduce(const Reduction& reduction, std::span<const Target> targets,
            std::span<const Source> sources, size_t count) {
  reduce_with(available_isas().front(), reduction, targets, sources, count);
}

const char* isa_name() { return available_isas().front().name; }

}  // namespace ringreduce
