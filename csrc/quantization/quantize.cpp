// Round to nearest. Lanes are the outputs of a strip, so every step is vertical.
//
// Where scale (and minimum) are numbers of the format's choice, they are searched: from several ranges, alternate
// between nearest levels and the least-squares scale (and minimum) for those levels; keep what gives the smallest
// squared error after rounding to float16. The plain range comes first, so a weight that lies on a grid of this kind is
// reproduced. nf4, fp4 and mxfp4 have a rule instead, so that others' checkpoints come out alike.
#include "core/scratch.h"
#include "quantization/line.h"

namespace fastweights::quantization::FW_LEVEL {

// extreme: the level that the weight of largest magnitude goes to where there is no minimum.
struct Range {
  float lowest, highest, extreme;
  int ranges, refinements;
};
template <Format F>
constexpr Range kRange = {};
template <>
constexpr Range kRange<Format::int4> = {0, 15, 0, 7, 2};
template <>
constexpr Range kRange<Format::int8> = {-127, 127, 0, 1, 0};
template <>
constexpr Range kRange<Format::iq4_nl> = {-127, 113, -127, 7, 2};

template <Format F>
constexpr bool kHasMinimum = kTraits<F>.parameter == Parameter::scale_minimum;

using Floats = Vec<float>;

FW_INLINE Floats round_float16(Floats v) {
  return widen(narrow(v, float16{}), float16{});
}

FW_INLINE Floats round_nearest(Floats v) {
  return (v + 12582912.0f) - 12582912.0f;
}

template <Format F>
FW_INLINE Floats nearest_level(Floats x) {
  if constexpr (kTraits<F>.levels == Levels::book) {
    using Book = CodeBook<F>;
    Floats level = set1(Book::levels[Book::order[0]]);
    FW_UNROLL
    for (int i = 0; i < 15; ++i) level = x > threshold<F>(i) ? set1(Book::levels[Book::order[i + 1]]) : level;
    return level;
  } else {
    return round_nearest(min(max(x, set1(kRange<F>.lowest)), set1(kRange<F>.highest)));
  }
}

template <Format F>
FW_INLINE Words nearest_code(Floats x) {
  if constexpr (kTraits<F>.levels == Levels::book) {
    using Book = CodeBook<F>;
    Words code = set1(Book::order[0]);
    FW_UNROLL
    for (int i = 0; i < 15; ++i) code = x > threshold<F>(i) ? set1(Book::order[i + 1]) : code;
    return code;
  } else {
    return __builtin_convertvector(nearest_level<F>(x), Words);
  }
}

// Scale 0 stands for a group of equal weights: level 0 (or the nearest to it) and the minimum say it all.
FW_INLINE Floats inverse_of(Floats scale) {
  return scale == 0.0f ? zero<float>() : 1.0f / scale;
}

// The weights of a group: w[i * 16], of n inputs.
struct Group {
  const float* w;
  int64_t n;
};

struct Extremes {
  Floats low, high, poison;  // poison: NaN if a weight is NaN or infinite, else 0
};

FW_INLINE Extremes extremes_of(Group group) {
  Extremes e{load(group.w), load(group.w), zero<float>()};
  for (int64_t i = 0; i < group.n; ++i) {
    const Floats x = load(group.w + i * kStrip);
    e.low = min(x, e.low);
    e.high = max(x, e.high);
    e.poison += x * 0.0f;
  }
  return e;
}

struct Fit {
  Floats scale, minimum, error;
};

// The error of (scale, minimum), and the least-squares pair for the levels that they give.
template <Format F>
FW_INLINE Fit evaluate(Group group, Floats scale, Floats minimum, Fit* refined) {
  scale = round_float16(scale);
  minimum = round_float16(minimum);
  const Floats inverse = inverse_of(scale);
  Floats error = zero<float>(), c1 = error, c2 = error, w1 = error, wc = error;
  for (int64_t i = 0; i < group.n; ++i) {
    const Floats x = load(group.w + i * kStrip), c = nearest_level<F>((x - minimum) * inverse);
    const Floats d = x - fma(scale, c, minimum);
    error = fma(d, d, error);
    c1 += c;
    c2 = fma(c, c, c2);
    w1 += x;
    wc = fma(x, c, wc);
  }
  if constexpr (kHasMinimum<F>) {
    const Floats count = set1(float(group.n)), determinant = count * c2 - c1 * c1;
    refined->scale = determinant > 0.0f ? (count * wc - c1 * w1) / determinant : zero<float>();
    refined->minimum = (w1 - refined->scale * c1) / count;
  } else {
    refined->scale = c2 > 0.0f ? wc / c2 : zero<float>();
    refined->minimum = zero<float>();
  }
  return {scale, minimum, error};
}

// The i-th range to try.
template <Format F>
FW_INLINE Fit first_guess(const Extremes& e, int i) {
  constexpr Range r = kRange<F>;
  if constexpr (kHasMinimum<F>) {  // shrunk around its middle
    const Floats scale = (e.high - e.low) / ((r.highest - r.lowest) * (1.0f + float(i) / 18.0f));
    const Floats middle = 0.5f * (e.low + e.high), center = set1(0.5f * (r.lowest + r.highest));
    return {scale, i ? middle - scale * center : e.low - scale * r.lowest, zero<float>()};
  } else {  // in turn wider and narrower
    const Floats largest = -e.low >= e.high ? e.low : e.high;
    return {largest * ((1.0f + float(i % 2 ? (i + 1) / 2 : -i / 2) / 18.0f) / r.extreme), zero<float>(), zero<float>()};
  }
}

template <Format F>
FW_INLINE Fit search(Group group) {
  const Extremes e = extremes_of(group);
  Fit best{};
  for (int range = 0; range < kRange<F>.ranges; ++range) {
    Fit next = first_guess<F>(e, range);
    for (int i = 0; i <= kRange<F>.refinements; ++i) {
      Fit refined;
      const Fit tried = evaluate<F>(group, next.scale, next.minimum, &refined);
      const VecInt<float> better = (range | i) ? tried.error < best.error : tried.scale == tried.scale;
      best.scale = better ? tried.scale : best.scale;
      best.minimum = better ? tried.minimum : best.minimum;
      best.error = better ? tried.error : best.error;
      next = refined;
    }
  }
  best.scale += e.poison;
  return best;
}

// Scale and codes of a group: `inverse` and `minimum` take a weight to where the levels are.
struct Grid {
  Floats scale, inverse, minimum;
};

template <Format F>
FW_INLINE Grid grid_of(Group group) {
  if constexpr (kTraits<F>.parameter == Parameter::scale_f32) {  // bitsandbytes: the largest magnitude becomes 1
    const Extremes e = extremes_of(group);
    const Floats scale = max(-e.low, e.high) + e.poison;
    return {scale, 1.0f / max(scale, set1(1e-38f)), zero<float>()};
  } else if constexpr (kTraits<F>.parameter == Parameter::scale_e8m0) {  // the largest magnitude falls into [4, 8)
    const Extremes e = extremes_of(group);
    const Words exponent = (bit_cast<Words>(max(-e.low, e.high)) >> 23) - 2;
    const Floats scale = power_of_two(exponent < 0 ? zero<int32_t>() : exponent);
    return {scale + e.poison, 1.0f / scale, zero<float>()};
  } else {
    const Fit fit = search<F>(group);
    return {fit.scale, inverse_of(fit.scale), fit.minimum};
  }
}

template <Format F>
static void store_parameters(const Grid& grid, int first, uint8_t* p) {
  constexpr Parameter kind = kTraits<F>.parameter;
  if constexpr (kind == Parameter::scale_f32) {
    store(reinterpret_cast<float*>(p) + first, grid.scale);
  } else if constexpr (kind == Parameter::scale_e8m0) {
    const Words bits = bit_cast<Words>(grid.scale);  // exponents above 252 are those of NaN
    for (int lane = 0; lane < kWords; ++lane) p[first + lane] = uint8_t(bits[lane] >> 23);
  } else {
    store_as(reinterpret_cast<float16*>(p) + first, grid.scale);
    if constexpr (kHasMinimum<F>) store_as(reinterpret_cast<float16*>(p) + kStrip + first, grid.minimum);
  }
}

// out[i][16] = W[16 strip + lane, k + i], zero outside the weight.
template <typename S>
static void load_group(const QuantizeArgs& a, int64_t strip, int64_t k, int64_t n, float* out) {
  const S* w = static_cast<const S*>(a.w);
  for (int64_t lane = 0; lane < kStrip; ++lane) {
    const int64_t row = strip * kStrip + lane;
    for (int64_t i = 0; i < n; ++i) {
      out[i * kStrip + lane] = row < a.weight.N ? float(to_compute(w[row * a.w_stride + k + i])) : 0.0f;
    }
  }
}

// n inputs of `rows` outputs; lines and parameters are all zeros before.
template <Format F>
static void pack_group(const float* w, int64_t n, int64_t rows, uint8_t* lines, uint8_t* parameters) {
  constexpr int bits = int(kTraits<F>.bits);
  for (int part = 0; part < kParts; ++part) {
    const int first = part * kWords;
    const Grid grid = grid_of<F>({w + first, n});
    store_parameters<F>(grid, first, parameters);
    for (int64_t k = 0; k < n; ++k) {
      const Words code = nearest_code<F>((load(w + k * kStrip + first) - grid.minimum) * grid.inverse);
      const int64_t q = k / 4;
      uint8_t* line = lines + q / kPerLine<F> * kLine + k % 4;
      for (int lane = 0; lane < kWords && first + lane < rows; ++lane) {
        line[(first + lane) * 4] |= uint8_t(code[lane] << (bits * (q % kPerLine<F>)));
      }
    }
  }
}

using LoadGroup = void (*)(const QuantizeArgs& a, int64_t strip, int64_t k, int64_t n, float* out);

static LoadGroup loader_of(Element element) {
  switch (element) {
    case Element::bf16:
      return &load_group<bfloat16>;
    case Element::f16:
      return &load_group<float16>;
    case Element::f64:
      return &load_group<double>;
    default:
      return &load_group<float>;
  }
}

template <Format F>
static void quantize_strip(const QuantizeArgs& a, LoadGroup load_weights, int64_t strip, float* w) {
  const Weight& q = a.weight;
  uint8_t* out = a.packed + strip * q.strip_bytes;
  __builtin_memset(out, 0, size_t(q.strip_bytes));
  const int64_t rows = q.N - strip * kStrip < kStrip ? q.N - strip * kStrip : kStrip;
  for (int64_t g = 0; g < q.groups; ++g) {
    const int64_t k = g * q.group, n = q.K - k < q.group ? q.K - k : q.group;
    load_weights(a, strip, k, n, w);
    pack_group<F>(w, n, rows, lines_of<F>(q, out, g), parameters_of<F>(q, out, g));
  }
}

void quantize(const QuantizeArgs& a, int64_t begin, int64_t end) noexcept {
  Scratch scratch(Scratch::take_bytes<float>(a.weight.group * kStrip));
  float* w = scratch.take<float>(a.weight.group * kStrip);
  const LoadGroup load_weights = loader_of(a.element);
  with_format(a.weight.format, [&]<Format F>(FormatTag<F>) {
    for (int64_t strip = begin; strip < end; ++strip) quantize_strip<F>(a, load_weights, strip, w);
  });
}

}  // namespace fastweights::quantization::FW_LEVEL
