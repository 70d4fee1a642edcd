// The builds of kernels.cpp, one per instruction set, and which of them this CPU can run.
// Private to reduce/ and its test; everyone else calls reduce().
#pragma once

#include <cstddef>
#include <span>

#include "base/dtype.h"
#include "base/op.h"
#include "reduce/reduce.h"

namespace ringreduce {

// reduce() for one dtype and op; at least one source and one target.
using Kernel = void(const Reduction& reduction, const Target* targets, size_t num_targets,
                    const Source* sources, size_t num_sources, size_t count);

// One kernel per dtype and op, in the order of their enumerators; null where supports() is false.
struct KernelRow {
  Kernel* of_op[num_ops];
};
struct KernelTable {
  KernelRow of_dtype[num_dtypes];
};

struct Isa {
  const char* name;
  const KernelTable* kernels;
};

// What this CPU can run, best first; never empty. The last one is "baseline".
std::span<const Isa> available_isas();

// reduce() on one of available_isas().
void reduce_with(const Isa& isa, const Reduction& reduction, std::span<const Target> targets,
                 std::span<const Source> sources, size_t count);

namespace baseline {
extern const KernelTable kernels;
}
namespace v3 {  // only in builds for x86-64
extern const KernelTable kernels;
}
namespace v4 {  // only in builds for x86-64
extern const KernelTable kernels;
}

}  // namespace ringreduce
