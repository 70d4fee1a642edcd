// The loops behind reduce(), written plainly for the compiler to vectorise. Built once for each
// instruction set, with RR_ISA as the name of the namespace. Nothing here may leave a function that
// the linker could share with another build: all is in unnamed namespaces, and of the standard
// library only types are used.
//
// All arithmetic is one loop, `combine`. It is run in one of two ways:
//   stream  over whole arrays. For sums of floats to one target, or to as many as there are sources
//           (an allreduce in place): an element stays in a register from its first load to its last
//           store, so the speed is that of the memory.
//   blocks  over pieces that stay in the first-level cache. For all else: `fold` combines the
//           sources, a few in each pass, and `deliver` takes the result to the targets.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "base/dtype.h"
#include "base/op.h"
#include "reduce/elements.h"
#include "reduce/isa.h"
#include "reduce/lines.h"
#include "reduce/reduce.h"

namespace ringreduce {
namespace RR_ISA {
namespace {

// ---- Elements

// An element at any address.
template <class T>
struct [[gnu::packed, gnu::may_alias]] Unaligned {
  T stored;
};

template <class T>
PartialOf<T> read(const Unaligned<T>& element) {
  return widen(element.stored);
}
template <class T>
void write(Unaligned<T>& element, PartialOf<T> value) {
  element.stored = narrow<T>(value);
}

// Float16 is converted eight at a time where the CPU has an instruction for it, which is several
// times faster than the loop over to_float or to_f16 and gives the same bits.
template <class T>
struct Eight;

#ifdef __F16C__
constexpr bool has_eights = true;

using Floats [[gnu::vector_size(32)]] = float;
using Halves [[gnu::vector_size(16)]] = short;

template <>
struct Eight<float> {
  using type = Floats;
};
template <>
struct Eight<f16> {
  using type = Halves;
};
Floats read(const Unaligned<Halves>& element) { return _mm256_cvtph_ps(__m128i(element.stored)); }
void write(Unaligned<Halves>& element, Floats value) {
  element.stored = Halves(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
#else
constexpr bool has_eights = false;
#endif

// ---- The loop

// to[*][i] = finish(first[i] op rest[0][i] op rest[1][i] ...) for i in [begin, end). An element is
// read from all sources before it is written, so targets may be sources; that iterations are
// independent nevertheless is what ivdep tells the compiler.
template <class Operation, int num_rest, int num_targets, class First, class Rest, class To,
          class Finish>
void combine_range(void* const* to, const void* first, const void* const* rest, size_t begin,
                   size_t end, Finish finish) {
  const auto* source = static_cast<const Unaligned<First>*>(first);
  const Unaligned<Rest>* others[num_rest + 1];
  Unaligned<To>* targets[num_targets];
  for (int r = 0; r < num_rest; ++r) others[r] = static_cast<const Unaligned<Rest>*>(rest[r]);
  for (int t = 0; t < num_targets; ++t) targets[t] = static_cast<Unaligned<To>*>(to[t]);
#pragma GCC ivdep
  for (size_t i = begin; i < end; ++i) {
    auto value = read(source[i]);
#pragma GCC unroll 8
    for (int r = 0; r < num_rest; ++r) value = Operation::of(value, read(others[r][i]));
    value = finish(value);
#pragma GCC unroll 8
    for (int t = 0; t < num_targets; ++t) write(targets[t][i], value);
  }
}

template <class Operation, int num_rest, int num_targets, class First, class Rest, class To,
          class Finish>
void combine(void* const* to, const void* first, const void* const* rest, size_t count,
             Finish finish) {
  size_t begin = 0;
  if constexpr (has_eights && (std::is_same_v<First, f16> || std::is_same_v<Rest, f16> ||
                               std::is_same_v<To, f16>)) {
    combine_range<Operation, num_rest, num_targets, typename Eight<First>::type,
                  typename Eight<Rest>::type, typename Eight<To>::type>(to, first, rest, 0,
                                                                        count / 8, finish);
    begin = count / 8 * 8;
  }
  combine_range<Operation, num_rest, num_targets, First, Rest, To>(to, first, rest, begin, count,
                                                                   finish);
}

template <class Finish>
using Loop = void(void* const* to, const void* first, const void* const* rest, size_t count,
                  Finish finish);

// Sources of one loop after the first. Sums of up to eight ranks take one pass; what is rarer may
// take more, and compiles faster.
template <class Operation>
constexpr int max_rest = std::is_same_v<Operation, Sum> ? 7 : 3;

// ---- Blocks

// loop[n] combines a first source and n more into one target.
template <class Operation, class First, class Rest, class To,
          class = std::make_integer_sequence<int, max_rest<Operation> + 1>>
struct Passes;
template <class Operation, class First, class Rest, class To, int... n>
struct Passes<Operation, First, Rest, To, std::integer_sequence<int, n...>> {
  static constexpr Loop<Keep>* loop[] = {combine<Operation, n, 1, First, Rest, To, Keep>...};
};

// The pass over n + 1 sources, of which the first and the others may be stored as 16-bit floats.
template <class Stored, class Operation>
Loop<Keep>* pass(bool first_is_half, bool rest_is_half, int n) {
  using Partial = PartialOf<Stored>;
  if constexpr (is_half<Stored>) {
    if (first_is_half) return Passes<Operation, Stored, Stored, Partial>::loop[n];
    if (rest_is_half) return Passes<Operation, Partial, Stored, Partial>::loop[n];
  }
  return Passes<Operation, Partial, Partial, Partial>::loop[n];
}

// A source or target from element `begin` on.
template <class Stored, class Array>
auto block_of(const Array& array, size_t begin) {
  using Byte = std::conditional_t<std::is_same_v<Array, Target>, char, const char>;
  const bool stored = array.format == Format::storage;
  return static_cast<Byte*>(array.data) +
         begin * (stored ? sizeof(Stored) : sizeof(PartialOf<Stored>));
}

// value[i] = sources[0][begin + i] op sources[1][begin + i] op ..., for i in [0, length).
template <class Stored, class Operation>
void fold(void* value, const Source* sources, size_t num_sources, size_t begin, size_t length) {
  const auto holds_halves = [&](size_t s) {
    return is_half<Stored> && s < num_sources && sources[s].format == Format::storage;
  };
  const void* first = block_of<Stored>(sources[0], begin);
  bool first_is_half = holds_halves(0);
  size_t taken = 1;
  do {
    const bool rest_is_half = first_is_half || holds_halves(taken);
    const void* rest[max_rest<Operation>];
    int n = 0;
    while (n < max_rest<Operation> && taken < num_sources && holds_halves(taken) == rest_is_half) {
      rest[n++] = block_of<Stored>(sources[taken++], begin);
    }
    pass<Stored, Operation>(first_is_half, rest_is_half, n)(&value, first, rest, length, Keep{});
    first = value;
    first_is_half = false;
  } while (taken < num_sources);
}

void copy(void* to, const void* from, size_t size_bytes) {
  if (to != from) memcpy(to, from, size_bytes);
}

// Finishes value[0, length) into `to`, which may be `value`. divisor: 1 for no division.
template <class Stored>
void finish(void* to, const void* value, int divisor, size_t length) {
  using Partial = PartialOf<Stored>;
  if constexpr (std::is_arithmetic_v<Partial>) {
    if (divisor != 1) {
      const DivideBy<Partial> divide{static_cast<decltype(divide.size)>(divisor)};
      combine<Sum, 0, 1, Partial, Partial, Stored>(&to, value, nullptr, length, divide);
      return;
    }
  }
  if constexpr (is_half<Stored>) {
    combine<Sum, 0, 1, Partial, Partial, Stored>(&to, value, nullptr, length, Keep{});
  } else {
    copy(to, value, length * sizeof(Stored));
  }
}

// Takes the lines of sources that have been read.
template <class Stored>
void take_read(const Source* sources, size_t num_sources, size_t begin, size_t end) {
  for (size_t s = 0; s < num_sources; ++s) {
    if (!sources[s].take) continue;
    const char* const first = block_of<Stored>(sources[s], begin);
    take(first, static_cast<size_t>(block_of<Stored>(sources[s], end) - first));
  }
}

// Takes value[0, length) to elements [begin, begin + length) of all targets. `value` may be that
// piece of the first target, so those that want it unfinished are served first.
template <class Stored>
void deliver(const void* value, int divisor, const Target* targets, size_t num_targets,
             size_t begin, size_t length) {
  for (size_t t = 0; t < num_targets; ++t) {
    if (targets[t].format == Format::storage) continue;
    copy(block_of<Stored>(targets[t], begin), value, length * sizeof(PartialOf<Stored>));
  }
  const void* finished = nullptr;
  for (size_t t = 0; t < num_targets; ++t) {
    if (targets[t].format == Format::partial) continue;
    void* const to = block_of<Stored>(targets[t], begin);
    if (finished) {
      copy(to, finished, length * sizeof(Stored));
    } else {
      finish<Stored>(to, value, divisor, length);
      finished = to;
    }
  }
}

int divisor_of(const Reduction& reduction) { return reduction.op == Op::avg ? reduction.size : 1; }

template <class Stored, class Operation>
void blocks(const Reduction& reduction, const Target* targets, size_t num_targets,
            const Source* sources, size_t num_sources, size_t count) {
  constexpr size_t block_bytes = 4096;
  constexpr size_t block_length = block_bytes / sizeof(PartialOf<Stored>);
  alignas(64) char space[block_bytes];
  // Values are kept in the first target itself, unless it is too narrow for them, or may be a
  // source that a second pass has yet to read.
  const bool in_target = !is_half<Stored> && num_sources <= max_rest<Operation> + 1;
  for (size_t begin = 0; begin < count; begin += block_length) {
    const size_t length = count - begin < block_length ? count - begin : block_length;
    void* const value = in_target ? block_of<Stored>(targets[0], begin) : space;
    fold<Stored, Operation>(value, sources, num_sources, begin, length);
    deliver<Stored>(value, divisor_of(reduction), targets, num_targets, begin, length);
    take_read<Stored>(sources, num_sources, begin, begin + length);
  }
}

// ---- Streams

// loop[n] combines n + 1 sources into one target, or into as many targets.
template <class T, bool into_one, class Finish,
          class = std::make_integer_sequence<int, max_rest<Sum> + 1>>
struct Streams;
template <class T, bool into_one, class Finish, int... n>
struct Streams<T, into_one, Finish, std::integer_sequence<int, n...>> {
  static constexpr Loop<Finish>* loop[] = {
      combine<Sum, n, (into_one ? 1 : n + 1), T, T, T, Finish>...};
};

template <class T, class Finish>
void stream(const Target* targets, size_t num_targets, const Source* sources, size_t num_sources,
            size_t count, Finish finish) {
  Loop<Finish>* const loop = num_targets == 1 ? Streams<T, true, Finish>::loop[num_sources - 1]
                                              : Streams<T, false, Finish>::loop[num_sources - 1];
  constexpr size_t piece = taken_bytes / sizeof(T);
  for (size_t begin = 0; begin < count; begin += piece) {
    const size_t rest = count - begin;
    const size_t length = rest < piece ? rest : piece;
    void* to[max_rest<Sum> + 1] = {};
    const void* from[max_rest<Sum> + 1] = {};
    for (size_t t = 0; t < num_targets; ++t) to[t] = block_of<T>(targets[t], begin);
    for (size_t s = 0; s < num_sources; ++s) from[s] = block_of<T>(sources[s], begin);
    loop(to, from[0], from + 1, length, finish);
    take_read<T>(sources, num_sources, begin, begin + length);
  }
}

// Sum and avg of floats.
template <class T>
void sum(const Reduction& reduction, const Target* targets, size_t num_targets,
         const Source* sources, size_t num_sources, size_t count) {
  bool streams =
      num_sources <= max_rest<Sum> + 1 && (num_targets == 1 || num_targets == num_sources);
  for (size_t s = 0; s < num_sources; ++s) streams &= sources[s].format == Format::storage;
  for (size_t t = 0; t < num_targets; ++t) streams &= targets[t].format == Format::storage;
  const int divisor = divisor_of(reduction);
  if (!streams) {
    blocks<T, Sum>(reduction, targets, num_targets, sources, num_sources, count);
  } else if (divisor == 1) {
    stream<T>(targets, num_targets, sources, num_sources, count, Keep{});
  } else {
    const DivideBy<PartialOf<T>> divide{static_cast<PartialOf<T>>(divisor)};
    stream<T>(targets, num_targets, sources, num_sources, count, divide);
  }
}

// Complex numbers are summed and divided part by part.
template <class T>
void sum_of_parts(const Reduction& reduction, const Target* targets, size_t num_targets,
                  const Source* sources, size_t num_sources, size_t count) {
  sum<T>(reduction, targets, num_targets, sources, num_sources, 2 * count);
}

// ---- The table: for each dtype the kernels of sum, avg, min, max and prod

template <class T>
constexpr KernelRow floats = {{sum<T>, sum<T>, blocks<T, Min>, blocks<T, Max>, blocks<T, Prod>}};

template <class T>
constexpr KernelRow integers = {
    {blocks<T, Sum>, blocks<T, Sum>, blocks<T, Min>, blocks<T, Max>, blocks<T, Prod>}};

constexpr KernelRow truths = {
    {blocks<Bool, Or>, nullptr, blocks<Bool, And>, blocks<Bool, Or>, blocks<Bool, And>}};

template <class T>
constexpr KernelRow complexes = {
    {sum_of_parts<T>, sum_of_parts<T>, nullptr, nullptr, blocks<Complex<T>, Prod>}};

}  // namespace

const KernelTable kernels = {{
    floats<double>,
    floats<float>,
    floats<f16>,
    floats<bf16>,
    integers<int64_t>,
    integers<int32_t>,
    integers<int16_t>,
    integers<int8_t>,
    integers<uint8_t>,
    truths,
    complexes<float>,
    complexes<double>,
}};

}  // namespace RR_ISA
}  // namespace ringreduce
