// Checks reduce() against the slow one of reduce_model.h: every dtype, op, format, number of
// sources, alignment and aliasing, on every instruction set this CPU has. Results must agree bit
// for bit, of NaNs only that they are NaNs. Prints what differs; exits with 1 if anything did.

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "base/half.h"
#include "reduce/isa.h"
#include "reduce/lines.h"
#include "reduce/reduce.h"
#include "reduce_model.h"

namespace ringreduce {
namespace {

using namespace model;

int num_failures = 0;

// ---- Random elements, one in `special` of them unusual

using Random = std::mt19937_64;

template <class T>
T random_element(Random& random, int special) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<int64_t>(random()) >> (random() % 64));  // any magnitude
  } else {
    using Limits = std::numeric_limits<T>;
    if (special == 0 || random() % special != 0) {
      return std::ldexp(static_cast<T>(static_cast<int32_t>(random())), -28);
    }
    const T unusual[] = {T(0),
                         -T(0),
                         Limits::infinity(),
                         -Limits::infinity(),
                         Limits::max(),
                         Limits::lowest(),
                         Limits::min(),
                         Limits::denorm_min(),
                         -Limits::denorm_min(),
                         Limits::min() * T(0.375),
                         T(1),
                         Limits::quiet_NaN()};
    return unusual[random() % std::size(unusual)];
  }
}

template <class D, class T>
T random_of(Random& random, int special) {
  if constexpr (std::is_same_v<T, std::complex<float>> || std::is_same_v<T, std::complex<double>>) {
    using Part = typename T::value_type;
    return {random_element<Part>(random, special), random_element<Part>(random, special)};
  } else if constexpr (std::is_same_v<D, Half<10>> || std::is_same_v<D, Half<7>>) {
    if constexpr (std::is_same_v<T, float>) {
      return random_element<float>(random, special);
    } else {  // ordinary values, or any bits at all
      if (special != 0 && random() % special == 0) return static_cast<uint16_t>(random());
      return D::store(random_element<float>(random, 0));
    }
  } else if constexpr (std::is_same_v<D, Truth>) {
    return random() % 2 ? 0 : static_cast<uint8_t>(random());
  } else {
    return random_element<T>(random, special);
  }
}

// ---- Arrays

// Bytes at a chosen misalignment, between guards that must stay as they are.
class Array {
 public:
  Array(size_t size_bytes, size_t misalignment)
      : bytes_(size_bytes + 2 * guard_bytes + misalignment, guard),
        begin_(guard_bytes + misalignment),
        size_bytes_(size_bytes) {}
  uint8_t* data() { return bytes_.data() + begin_; }
  const uint8_t* data() const { return bytes_.data() + begin_; }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }
  bool guards_intact() const {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      const bool inside = i >= begin_ && i < begin_ + size_bytes_;
      if (!inside && bytes_[i] != guard) return false;
    }
    return true;
  }
  template <class T>
  T get(size_t i) const {
    T element;
    memcpy(&element, data() + i * sizeof(T), sizeof(T));
    return element;
  }
  template <class T>
  void set(size_t i, T element) {
    memcpy(data() + i * sizeof(T), &element, sizeof(T));
  }

 private:
  static constexpr size_t guard_bytes = 128;
  static constexpr uint8_t guard = 0xa5;
  std::vector<uint8_t> bytes_;
  size_t begin_;
  size_t size_bytes_;
};

// ---- One case: sources, and every kind of targets for them

// What a call writes: targets[t] has formats[t] and is source alias[t], or an array of its own
// (-1).
struct Targets {
  const char* name;
  std::vector<Format> formats;
  std::vector<int> alias;
};

std::vector<Targets> kinds_of_targets(const std::vector<Format>& sources) {
  const Format s = Format::storage, p = Format::partial;
  const int last = static_cast<int>(sources.size()) - 1;
  Targets all{"in place", {}, {}}, backwards{"in place, backwards", {}, {}};
  for (int i = 0; i <= last; ++i) {
    all.formats.push_back(sources[i]);
    all.alias.push_back(i);
    backwards.formats.push_back(sources[last - i]);
    backwards.alias.push_back(last - i);
  }
  return {all,
          backwards,
          {"one result", {s}, {-1}},
          {"one partial", {p}, {-1}},
          {"results and partials", {s, p, s, p}, {-1, -1, -1, -1}},
          {"partial, then over the first", {p, sources[0]}, {-1, 0}},
          {"over the last", {sources[last]}, {last}},
          {"over the last, then both", {sources[last], s, p}, {last, -1, -1}}};
}

template <class D>
class Case {
 public:
  Case(const Reduction& reduction, const std::vector<Format>& formats, size_t count, int special,
       Random& random)
      : reduction_(reduction), formats_(formats), count_(count), random_(random) {
    for (Format format : formats) {
      sources_.push_back(new_array(format));
      for (size_t i = 0; i < count; ++i) {
        if (format == Format::storage) {
          sources_.back().set(i, random_of<D, typename D::Stored>(random, special));
        } else {
          sources_.back().set(i, random_of<D, typename D::Partial>(random, special));
        }
      }
    }
    compute_expected();
  }

  void run() {
    for (const Targets& targets : kinds_of_targets(formats_)) {
      for (const Isa& isa : available_isas()) run(targets, isa);
    }
  }

 private:
  Array new_array(Format format) {
    return Array(count_ * size_of(reduction_.dtype, format), random_() % 2 ? random_() % 64 : 0);
  }

  auto load(const Array& array, Format format, size_t i) const {
    return format == Format::storage ? D::load(array.get<typename D::Stored>(i))
                                     : D::load(array.get<typename D::Partial>(i));
  }

  void compute_expected() {
    for (size_t i = 0; i < count_; ++i) {
      auto value = load(sources_[0], formats_[0], i);
      for (size_t s = 1; s < sources_.size(); ++s) {
        value = combine(reduction_.op, value, load(sources_[s], formats_[s], i));
      }
      partials_.push_back(value);
      if (reduction_.op == Op::avg) value = divide(value, reduction_.size);
      results_.push_back(D::store(value));
    }
  }

  void run(const Targets& kind, const Isa& isa) {
    std::vector<Array> arrays = sources_;
    std::vector<size_t> written;  // which of the arrays are targets
    for (size_t t = 0; t < kind.formats.size(); ++t) {
      written.push_back(kind.alias[t] < 0 ? arrays.size() : static_cast<size_t>(kind.alias[t]));
      if (kind.alias[t] < 0) arrays.push_back(new_array(kind.formats[t]));
    }
    std::vector<Source> sources;
    for (size_t s = 0; s < formats_.size(); ++s) {
      const bool is_target = std::find(written.begin(), written.end(), s) != written.end();
      sources.push_back({arrays[s].data(), formats_[s], !is_target && random_() % 2});
    }
    std::vector<Target> targets;
    for (size_t t = 0; t < written.size(); ++t) {
      targets.push_back({arrays[written[t]].data(), kind.formats[t]});
    }
    reduce_with(isa, reduction_, targets, sources, count_);
    for (size_t t = 0; t < written.size(); ++t) {
      check(arrays[written[t]], kind.formats[t], t, kind, isa);
    }
    for (size_t s = 0; s < formats_.size(); ++s) {
      const bool is_target = std::find(written.begin(), written.end(), s) != written.end();
      if (sources[s].take) {
        check_taken(arrays[s], s, kind, isa);
      } else if (!is_target && !(arrays[s] == sources_[s])) {
        report("a source changed", s, 0, kind, isa);
      }
    }
  }

  void check(const Array& array, Format format, size_t t, const Targets& kind, const Isa& isa) {
    if (!array.guards_intact()) report("a byte outside was written, target", t, 0, kind, isa);
    for (size_t i = 0; i < count_; ++i) {
      const bool good = format == Format::storage
                            ? D::same(array.get<typename D::Stored>(i), results_[i])
                            : D::same(array.get<typename D::Partial>(i), partials_[i]);
      if (!good) return report("wrong value, target", t, i, kind, isa);
    }
  }

  /// A byte of every line was written, and none outside.
  void check_taken(const Array& array, size_t s, const Targets& kind, const Isa& isa) {
    if (!array.guards_intact()) report("a byte outside was taken, source", s, 0, kind, isa);
    const uint8_t* const data = array.data();
    const size_t size_bytes = count_ * size_of(reduction_.dtype, formats_[s]);
    for (size_t at = 0; at < size_bytes; at += cache_line_bytes) {
      if (data[at] != taken_mark) return report("a line was not taken, source", s, at, kind, isa);
    }
  }

  void report(const char* what, size_t which, size_t i, const Targets& kind, const Isa& isa) {
    if (++num_failures > 20) return;
    std::string formats;
    for (Format format : formats_) formats += format == Format::storage ? 's' : 'p';
    printf("%s %s, size %d, sources %s, count %zu, %s, %s: %s %zu, element %zu\n",
           name_of(reduction_.dtype), name_of(reduction_.op), reduction_.size, formats.c_str(),
           count_, kind.name, isa.name, what, which, i);
  }

  const Reduction reduction_;
  const std::vector<Format> formats_;
  const size_t count_;
  Random& random_;
  std::vector<Array> sources_;
  std::vector<typename D::Partial> partials_;
  std::vector<typename D::Stored> results_;
};

// Sources all finished, all partial, and mixed.
std::vector<std::vector<Format>> kinds_of_sources(size_t num_sources, Random& random) {
  std::vector<Format> mixed(num_sources);
  for (Format& format : mixed) format = random() % 2 ? Format::storage : Format::partial;
  return {std::vector<Format>(num_sources, Format::storage),
          std::vector<Format>(num_sources, Format::partial), mixed};
}

template <class D>
void test_dtype(Dtype dtype, Random& random) {
  for (Op op : {Op::sum, Op::avg, Op::min, Op::max, Op::prod}) {
    if (!supports(op, dtype)) continue;
    for (size_t num_sources : {1, 2, 3, 8, 13}) {
      for (const auto& formats : kinds_of_sources(num_sources, random)) {
        for (size_t count : {0, 1, 7, 1023, 4096, 10007}) {
          // The divisor of avg is not always the number of sources: a sum may arrive in parts.
          const int size = random() % 4 == 0 ? 1 + static_cast<int>(random() % 300)
                                             : static_cast<int>(num_sources);
          const int special = count % 2 ? 4 * static_cast<int>(num_sources) : 0;
          Case<D>({dtype, op, size}, formats, count, special, random).run();
        }
      }
    }
  }
}

// More sources and targets than any loop takes at once.
void test_many(Random& random) {
  for (size_t num_sources : {16, 64, 100}) {
    for (const auto& formats : kinds_of_sources(num_sources, random)) {
      const int size = static_cast<int>(num_sources);
      Case<Plain<float>>({Dtype::f32, Op::avg, size}, formats, 3001, 0, random).run();
      Case<Half<7>>({Dtype::bf16, Op::sum, size}, formats, 3001, 0, random).run();
      Case<Plain<int16_t>>({Dtype::i16, Op::max, size}, formats, 3001, 0, random).run();
    }
  }
}

// ---- Conversions

// Every 16-bit float; and float32 numbers around every place where rounding changes its mind.
template <int fraction_bits>
std::vector<float> floats_to_round(Random& random) {
  std::vector<float> values;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const float value = decode(static_cast<uint16_t>(bits), fraction_bits);
    const float next = decode(static_cast<uint16_t>(bits + 1), fraction_bits);
    const float middle = static_cast<float>((double{value} + double{next}) / 2);
    for (float near : {value, middle}) {
      values.push_back(near);
      values.push_back(std::nextafter(near, HUGE_VALF));
      values.push_back(std::nextafter(near, -HUGE_VALF));
    }
    values.push_back(float_of(static_cast<uint32_t>(random())));
  }
  return values;
}

// While one exists, this thread takes denormal numbers for zero and rounds results to zero instead.
class FlushDenormals {
 public:
#ifdef __SSE__
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

void expect_same(bool good, Dtype dtype, const char* what, const char* isa, size_t i) {
  if (good || ++num_failures > 20) return;
  printf("%s: %s, %s, is wrong for element %zu\n", name_of(dtype), what, isa, i);
}

// half.h, and the same conversions as single-source reductions.
template <int fraction_bits, class HalfType, HalfType to_half(float)>
void test_conversions(Dtype dtype, Random& random) {
  using D = Half<fraction_bits>;
  const std::vector<float> wide = floats_to_round<fraction_bits>(random);
  std::vector<uint16_t> rounded(wide.size()), halves(0x10000);
  std::vector<float> widened(halves.size());
  for (size_t i = 0; i < wide.size(); ++i) rounded[i] = D::store(wide[i]);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  for (size_t i = 0; i < halves.size(); ++i) widened[i] = D::load(halves[i]);

  const auto check = [&](const char* isa, const std::vector<uint16_t>& got_rounded,
                         const std::vector<float>& got_widened) {
    for (size_t i = 0; i < wide.size(); ++i) {
      expect_same(D::same(got_rounded[i], rounded[i]), dtype, "rounding", isa, i);
    }
    for (size_t i = 0; i < halves.size(); ++i) {
      expect_same(D::same(got_widened[i], widened[i]), dtype, "widening", isa, i);
    }
  };
  std::vector<uint16_t> got_rounded(wide.size());
  std::vector<float> got_widened(halves.size());
  const auto convert_here = [&] {
    for (size_t i = 0; i < wide.size(); ++i) got_rounded[i] = to_half(wide[i]).bits;
    for (size_t i = 0; i < halves.size(); ++i) got_widened[i] = to_float(HalfType{halves[i]});
  };
  const auto convert_by = [&](const Isa& isa) {
    const Target to_storage{got_rounded.data(), Format::storage};
    const Target to_partial{got_widened.data(), Format::partial};
    const Source from_partial{wide.data(), Format::partial};
    const Source from_storage{halves.data(), Format::storage};
    const Reduction sum{dtype, Op::sum, 1};
    reduce_with(isa, sum, {&to_storage, 1}, {&from_partial, 1}, wide.size());
    reduce_with(isa, sum, {&to_partial, 1}, {&from_storage, 1}, halves.size());
  };

  convert_here();
  check("half.h", got_rounded, got_widened);
  for (const Isa& isa : available_isas()) {
    convert_by(isa);
    check(isa.name, got_rounded, got_widened);
  }
  {
    const FlushDenormals flush;
    convert_here();
  }
  check("half.h without denormals", got_rounded, got_widened);
  for (const Isa& isa : available_isas()) {
    {
      const FlushDenormals flush;
      convert_by(isa);
    }
    check(isa.name, got_rounded, got_widened);
  }
}

void test_all() {
  Random random(1);
  test_conversions<10, f16, to_f16>(Dtype::f16, random);
  test_conversions<7, bf16, to_bf16>(Dtype::bf16, random);
  test_dtype<Plain<double>>(Dtype::f64, random);
  test_dtype<Plain<float>>(Dtype::f32, random);
  test_dtype<Half<10>>(Dtype::f16, random);
  test_dtype<Half<7>>(Dtype::bf16, random);
  test_dtype<Plain<int64_t>>(Dtype::i64, random);
  test_dtype<Plain<int32_t>>(Dtype::i32, random);
  test_dtype<Plain<int16_t>>(Dtype::i16, random);
  test_dtype<Plain<int8_t>>(Dtype::i8, random);
  test_dtype<Plain<uint8_t>>(Dtype::u8, random);
  test_dtype<Truth>(Dtype::boolean, random);
  test_dtype<Plain<std::complex<float>>>(Dtype::c64, random);
  test_dtype<Plain<std::complex<double>>>(Dtype::c128, random);
  test_many(random);
}

}  // namespace
}  // namespace ringreduce

int main() {
  ringreduce::test_all();
  printf("reduce on");
  for (const ringreduce::Isa& isa : ringreduce::available_isas()) printf(" %s", isa.name);
  printf(": %d failures\n", ringreduce::num_failures);
  return ringreduce::num_failures == 0 ? 0 : 1;
}
