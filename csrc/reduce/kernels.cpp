// The loops behind reduce(), written plainly for the compiler to vectorise. Built once for each
// instruction set, with RR_ISA as the name of the namespace. Nothing here may leave a function that
// the linker could share with another build: all is in unnamed namespaces, and of the standard
// library only types are used.
//
// An array is worked through in blocks that stay in the first-level cache. For each block
//   fold     combines all sources, several in one pass, into `value`,
//   deliver  copies `value`, finished where that is wanted, to each target.
// Where every source is also a target, as in an allreduce in place, sums of float32 and float64
// need no blocks: `stream` keeps each element in a register from the first load to the last store.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "base/dtype.h"
#include "base/half.h"
#include "base/op.h"
#include "reduce/isa.h"
#include "reduce/reduce.h"

namespace ringreduce {
namespace RR_ISA {
namespace {

// ---- Elements

enum class Bool : uint8_t {};

template <class T>
struct Complex {
  T real, imaginary;
};

// An element at any address.
template <class T>
struct [[gnu::packed, gnu::may_alias]] Unaligned {
  T value;
};

template <class T>
using In = const Unaligned<T>*;
template <class T>
using Out = Unaligned<T>*;

template <class T>
T read(Unaligned<T> element) {
  return element.value;
}
Bool read(Unaligned<Bool> element) { return Bool(element.value != Bool{0}); }  // any byte but 0

// The type in which unfinished values of a stored type are kept.
template <class Stored>
struct PartialType {
  using type = Stored;
};
template <>
struct PartialType<f16> {
  using type = float;
};
template <>
struct PartialType<bf16> {
  using type = float;
};
template <class Stored>
using PartialOf = typename PartialType<Stored>::type;

template <class Stored>
constexpr bool is_half = !std::is_same_v<Stored, PartialOf<Stored>>;

// ---- Operations

// Integers wrap: they are combined as unsigned numbers, at least as wide as int, and cut to size.
template <class T>
struct WrappingType {
  using type = T;
};
template <class T>
  requires std::is_integral_v<T>
struct WrappingType<T> {
  using type = std::common_type_t<std::make_unsigned_t<T>, unsigned>;
};
template <class T>
using Wrapping = typename WrappingType<T>::type;

struct Sum {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
  }
};

struct Prod {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<Wrapping<T>>(a) * static_cast<Wrapping<T>>(b));
  }
  template <class T>
  static Complex<T> of(Complex<T> a, Complex<T> b) {
    return {a.real * b.real - a.imaginary * b.imaginary,
            a.real * b.imaginary + a.imaginary * b.real};
  }
};

// A NaN differs from itself. If a is one it is chosen; if b is one, no comparison with it holds.
struct Min {
  template <class T>
  static T of(T a, T b) {
    return (a < b) | (a != a) ? a : b;
  }
};

struct Max {
  template <class T>
  static T of(T a, T b) {
    return (a > b) | (a != a) ? a : b;
  }
};

// The sum and maximum, and the product and minimum, of truth values.
struct Or {
  static Bool of(Bool a, Bool b) { return Bool(uint8_t(a) | uint8_t(b)); }
};

struct And {
  static Bool of(Bool a, Bool b) { return Bool(uint8_t(a) & uint8_t(b)); }
};

// What happens to a combined value before it is written.
struct Keep {
  template <class T>
  T operator()(T value) const {
    return value;
  }
};

template <class T>
struct DivideBy {
  std::common_type_t<T, int> size;
  T operator()(T value) const { return static_cast<T>(value / size); }  // integers: toward zero
};

// ---- Loops

// The loop of all reductions: to[*][i] = finish(from[0][i] op from[1][i] op ...), i in [0, count).
// Each element is read from all sources before it is written, so arrays may coincide; ivdep tells
// the compiler that iterations are independent all the same.
template <class Operation, int num_sources, int num_targets, class T, class Finish>
void combine(const Out<T>* to, const In<T>* from, size_t count, Finish finish) {
  Out<T> target[num_targets];
  In<T> source[num_sources];
  for (int t = 0; t < num_targets; ++t) target[t] = to[t];
  for (int s = 0; s < num_sources; ++s) source[s] = from[s];
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) {
    T value = read(source[0][i]);
#pragma GCC unroll 8
    for (int s = 1; s < num_sources; ++s) value = Operation::of(value, read(source[s][i]));
    value = finish(value);
#pragma GCC unroll 8
    for (int t = 0; t < num_targets; ++t) target[t][i].value = value;
  }
}

template <class T>
void divide(Out<T> values, int size, size_t count) {
  const DivideBy<T> by{static_cast<decltype(DivideBy<T>::size)>(size)};
  for (size_t i = 0; i < count; ++i) values[i].value = by(values[i].value);
}

template <class Half>
void widen(Out<float> to, In<Half> from, size_t count) {
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) to[i].value = to_float(from[i].value);
}

void narrow(Out<bf16> to, In<float> from, size_t count) {
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) to[i].value = to_bf16(from[i].value);
}

void narrow(Out<f16> to, In<float> from, size_t count) {
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) to[i].value = to_f16(from[i].value);
}

template <class T>
void copy(void* to, const Unaligned<T>* from, size_t count) {
  if (to != from) memcpy(to, from, count * sizeof(T));
}

// ---- Blocks

// Elements of a block: 4 KiB of values.
template <class Stored>
constexpr size_t block_length = 4096 / sizeof(PartialOf<Stored>);

// Sources combined in one pass. The widened copies of 16-bit sources need cache of their own.
template <class Stored>
constexpr int max_rows = is_half<Stored> ? 4 : 8;

template <class T, class Finish>
using Loop = void(const Out<T>* to, const In<T>* from, size_t count, Finish finish);

// loop[n] combines n + 1 sources into one target.
template <class Operation, class T, class Rows>
struct Passes;
template <class Operation, class T, int... n>
struct Passes<Operation, T, std::integer_sequence<int, n...>> {
  static constexpr Loop<T, Keep>* loop[] = {combine<Operation, n + 1, 1, T, Keep>...};
};

// Elements [begin, begin + length) of a source as partial values: its own memory where that holds
// them, otherwise `space`, filled with them.
template <class Stored>
In<PartialOf<Stored>> partial_values(const Source& source, size_t begin, size_t length,
                                     Out<PartialOf<Stored>> space) {
  if constexpr (is_half<Stored>) {
    if (source.format == Format::storage) {
      widen(space, static_cast<In<Stored>>(source.data) + begin, length);
      return space;
    }
  }
  return static_cast<In<PartialOf<Stored>>>(source.data) + begin;
}

// value[i] = sources[0][begin + i] op sources[1][begin + i] op ..., for i in [0, length).
template <class Stored, class Operation>
void fold(Out<PartialOf<Stored>> value, const Source* sources, size_t num_sources, size_t begin,
          size_t length) {
  using Partial = PartialOf<Stored>;
  constexpr int rows = max_rows<Stored>;
  constexpr size_t space_length = is_half<Stored> ? block_length<Stored> : 1;
  alignas(64) Unaligned<Partial> space[rows][space_length];
  In<Partial> from[rows];
  for (size_t taken = 0; taken < num_sources;) {
    int n = 0;
    if (taken > 0) from[n++] = value;
    for (; n < rows && taken < num_sources; ++n, ++taken) {
      from[n] = partial_values<Stored>(sources[taken], begin, length, space[n]);
    }
    Passes<Operation, Partial, std::make_integer_sequence<int, rows>>::loop[n - 1](&value, from,
                                                                                  length, {});
  }
}

// Writes value[0, length) to elements [begin, begin + length) of every target, first to those that
// take it unfinished: it is finished in place. `value` may be the block of the first target.
template <class Stored>
void deliver(Out<PartialOf<Stored>> value, bool divides, int size, const Target* targets,
             size_t num_targets, size_t begin, size_t length) {
  for (size_t t = 0; t < num_targets; ++t) {
    if (targets[t].format == Format::storage) continue;
    copy(static_cast<Out<PartialOf<Stored>>>(targets[t].data) + begin, value, length);
  }
  if constexpr (std::is_arithmetic_v<PartialOf<Stored>>) {
    if (divides) divide(value, size, length);
  }
  In<Stored> finished = nullptr;
  if constexpr (!is_half<Stored>) finished = value;
  for (size_t t = 0; t < num_targets; ++t) {
    if (targets[t].format == Format::partial) continue;
    const Out<Stored> to = static_cast<Out<Stored>>(targets[t].data) + begin;
    if constexpr (is_half<Stored>) {
      if (!finished) {
        narrow(to, value, length);
        finished = to;
      }
    }
    copy(to, finished, length);
  }
}

template <class Stored, class Operation>
void reduce_in_blocks(const Reduction& reduction, const Target* targets, size_t num_targets,
                      const Source* sources, size_t num_sources, size_t count) {
  using Partial = PartialOf<Stored>;
  size_t num_finished = 0;
  for (size_t t = 0; t < num_targets; ++t) num_finished += targets[t].format == Format::storage;
  const bool divides = reduction.op == Op::avg && reduction.size > 1 && num_finished > 0;

  // Values are kept in the first target itself, unless it is too narrow for them, or is a source
  // that a second pass has yet to read, or would be divided before others got the undivided value.
  const bool in_target = num_targets > 0 && num_sources <= max_rows<Stored> &&
                         (!is_half<Stored> || targets[0].format == Format::partial) &&
                         (!divides || num_finished == num_targets);
  alignas(64) Unaligned<Partial> space[block_length<Stored>];
  for (size_t begin = 0; begin < count; begin += block_length<Stored>) {
    const size_t left = count - begin;
    const size_t length = left < block_length<Stored> ? left : block_length<Stored>;
    const Out<Partial> value =
        in_target ? static_cast<Out<Partial>>(targets[0].data) + begin : space;
    fold<Stored, Operation>(value, sources, num_sources, begin, length);
    deliver<Stored>(value, divides, reduction.size, targets, num_targets, begin, length);
  }
}

// ---- Streams

// loop[n] combines n + 2 sources into as many targets.
template <class T, class Finish, class Sources>
struct Streams;
template <class T, class Finish, int... n>
struct Streams<T, Finish, std::integer_sequence<int, n...>> {
  static constexpr Loop<T, Finish>* loop[] = {combine<Sum, n + 2, n + 2, T, Finish>...};
};

constexpr int max_streams = 8;

template <class T, class Finish>
void stream(const Target* targets, const Source* sources, size_t num, size_t count, Finish finish) {
  Out<T> to[max_streams];
  In<T> from[max_streams];
  for (size_t n = 0; n < num; ++n) {
    to[n] = static_cast<Out<T>>(targets[n].data);
    from[n] = static_cast<In<T>>(sources[n].data);
  }
  Streams<T, Finish, std::make_integer_sequence<int, max_streams - 1>>::loop[num - 2](
      to, from, count, finish);
}

// Sum and avg of float32 and float64.
template <class T>
void sum(const Reduction& reduction, const Target* targets, size_t num_targets,
         const Source* sources, size_t num_sources, size_t count) {
  size_t num_divided = 0;
  if (reduction.op == Op::avg && reduction.size > 1) {
    for (size_t t = 0; t < num_targets; ++t) num_divided += targets[t].format == Format::storage;
  }
  const bool fits = num_targets == num_sources && num_sources >= 2 && num_sources <= max_streams;
  if (fits && num_divided == 0) {
    stream<T>(targets, sources, num_sources, count, Keep{});
  } else if (fits && num_divided == num_targets) {
    stream<T>(targets, sources, num_sources, count, DivideBy<T>{static_cast<T>(reduction.size)});
  } else {
    reduce_in_blocks<T, Sum>(reduction, targets, num_targets, sources, num_sources, count);
  }
}

// Complex numbers are summed and divided part by part.
template <class T>
void sum_of_parts(const Reduction& reduction, const Target* targets, size_t num_targets,
                  const Source* sources, size_t num_sources, size_t count) {
  sum<T>(reduction, targets, num_targets, sources, num_sources, 2 * count);
}

// ---- The table: for each dtype the kernels of sum, avg, min, max and prod

template <class T, class Operation>
constexpr Kernel* blocks = reduce_in_blocks<T, Operation>;

template <class T>
constexpr KernelRow floats = {
    {sum<T>, sum<T>, blocks<T, Min>, blocks<T, Max>, blocks<T, Prod>}};

template <class T>
constexpr KernelRow narrow_floats_or_integers = {
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
    narrow_floats_or_integers<f16>,
    narrow_floats_or_integers<bf16>,
    narrow_floats_or_integers<int64_t>,
    narrow_floats_or_integers<int32_t>,
    narrow_floats_or_integers<int16_t>,
    narrow_floats_or_integers<int8_t>,
    narrow_floats_or_integers<uint8_t>,
    truths,
    complexes<float>,
    complexes<double>,
}};

}  // namespace RR_ISA
}  // namespace ringreduce
