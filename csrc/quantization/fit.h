// The scales and minima of a group, or of a bundle of groups that shares some. Lanes are the outputs of a strip, so
// every step is vertical.
//
// Where scale (and minimum) are numbers of the format's choice, they are searched: from several ranges, alternate
// between nearest levels and the least-squares scale (and minimum) for those levels; keep what gives the smallest
// squared error after rounding to float16. The plain range comes first, so a weight that lies on a grid of this kind is
// reproduced. With 2 and 3 bits 0 is kept among the levels, and the error weighed by rms + |w|: where the steps are
// wide, what is small must stay small. nf4, fp4, mxfp4, fp8_e4m3 and zero points have a rule instead, so that others'
// checkpoints come out alike.
#pragma once

#include "quantization/rounding.h"

namespace fastweights::quantization::FW_LEVEL {

// How many ranges are tried, how far they lie apart, and how often each is refined.
struct Search {
  int ranges, refinements;
  float step;
};
template <Format F>
constexpr Search kSearch = kTraits<F>.bits == 8   ? Search{1, 0, 0.0f}
                           : kTraits<F>.bits >= 5 ? Search{7, 2, 1.0f / 36}
                           : kTraits<F>.bits == 2 ? Search{7, 2, 1.0f / 9}
                                                  : Search{7, 2, 1.0f / 18};

template <Format F>
constexpr bool kHasMinimum =
    kTraits<F>.parameter == Parameter::scale_minimum || kTraits<F>.parameter == Parameter::q4_k;

template <Format F>
constexpr bool kKeepsZero = kTraits<F>.parameter == Parameter::scale_minimum && kTraits<F>.bits <= 3;

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

// Scale 0 stands for a group of equal weights: level 0 (or the nearest to it) and the minimum say it all.
FW_INLINE Floats inverse_of(Floats scale) {
  return scale == 0.0f ? zero<float>() : 1.0f / scale;
}

FW_INLINE Floats round_float16(Floats v) {
  return widen(narrow(v, float16{}), float16{});
}

// `minimum` and `inverse` take a weight to where the levels are.
struct Grid {
  Floats scale, minimum, inverse, zero;  // zero: where a weight has zero points
};

// ---- search ------------------------------------------------------------------------------------------------------

struct Fit {
  Floats scale, minimum, error;
  Floats zero;  // the level that stands for 0, where one is kept
};

FW_INLINE Floats root_mean_square(Group group) {
  Floats sum = zero<float>();
  for (int64_t i = 0; i < group.n; ++i) {
    const Floats x = load(group.w + i * kStrip);
    sum = fma(x, x, sum);
  }
  for (int64_t j = 0; j < kStrip; ++j) sum[j] = __builtin_sqrtf(sum[j] / float(group.n));
  return sum;
}

// What can be stored of it. A bundle's scales and minima are rounded together, later.
template <Format F>
FW_INLINE Fit storable(Fit fit) {
  if constexpr (kTraits<F>.parameter == Parameter::q4_k) {
    fit.minimum = min(fit.minimum, zero<float>());
  } else if constexpr (kTraits<F>.parameter != Parameter::q6_k) {
    fit.scale = round_float16(fit.scale);
    if constexpr (kKeepsZero<F>) fit.minimum = zero<float>() - fit.scale * fit.zero;  // 0, not -0
    fit.minimum = round_float16(fit.minimum);
  }
  return fit;
}

// The error of a fit, and the least-squares scale (and minimum) for the levels that it gives.
template <Format F>
FW_INLINE Fit evaluate(Group group, [[maybe_unused]] Floats rms, Fit fit, Fit* refined) {
  fit = storable<F>(fit);
  const Floats inverse = inverse_of(fit.scale);
  Floats error = zero<float>(), c1 = error, c2 = error, w1 = error, wc = error;
  for (int64_t i = 0; i < group.n; ++i) {
    const Floats x = load(group.w + i * kStrip);
    Floats c = nearest_level<F>((x - fit.minimum) * inverse);
    const Floats d = x - fma(fit.scale, c, fit.minimum);
    if constexpr (kKeepsZero<F>) {
      const Floats weight = rms + (x < 0.0f ? -x : x);
      c -= fit.zero;
      error = fma(weight * d, d, error);
      c2 = fma(weight * c, c, c2);
      wc = fma(weight * x, c, wc);
    } else {
      error = fma(d, d, error);
      c1 += c;
      c2 = fma(c, c, c2);
      w1 += x;
      wc = fma(x, c, wc);
    }
  }
  fit.error = error;
  *refined = fit;
  refined->scale = c2 > 0.0f ? wc / c2 : zero<float>();
  if constexpr (kHasMinimum<F> && !kKeepsZero<F>) {
    const Floats count = set1(float(group.n)), determinant = count * c2 - c1 * c1;
    const Floats scale = determinant > 0.0f ? (count * wc - c1 * w1) / determinant : zero<float>();
    const Floats minimum = (w1 - scale * c1) / count;
    const VecInt<float> free = kTraits<F>.parameter == Parameter::q4_k ? minimum <= 0.0f : minimum == minimum;
    refined->scale = free ? scale : refined->scale;
    refined->minimum = free ? minimum : zero<float>();
  }
  return fit;
}

// The i-th range to try.
template <Format F>
FW_INLINE Fit first_guess(const Extremes& e, int i) {
  constexpr Range r = range_of<F>();
  if constexpr (kHasMinimum<F>) {  // shrunk around its middle
    constexpr bool spans_zero = kKeepsZero<F> || kTraits<F>.parameter == Parameter::q4_k;
    const Floats low = spans_zero ? min(e.low, zero<float>()) : e.low;
    const Floats high = kKeepsZero<F> ? max(e.high, zero<float>()) : e.high;
    const Floats scale = (high - low) / ((r.highest - r.lowest) * (1.0f + float(i) * kSearch<F>.step));
    const Floats middle = 0.5f * (low + high), center = set1(0.5f * (r.lowest + r.highest));
    const Floats minimum = i ? middle - scale * center : low - scale * r.lowest;
    const Floats at = round_nearest(-minimum * inverse_of(scale));
    return {scale, minimum, zero<float>(), min(max(at, set1(r.lowest)), set1(r.highest))};
  } else {  // in turn wider and narrower
    const Floats largest = -e.low >= e.high ? e.low : e.high;
    const float width = 1.0f + float(i % 2 ? (i + 1) / 2 : -i / 2) * kSearch<F>.step;
    return {largest * (width / r.extreme), zero<float>(), zero<float>(), zero<float>()};
  }
}

template <Format F>
FW_INLINE Grid search(Group group) {
  const Extremes e = extremes_of(group);
  const Floats rms = kKeepsZero<F> ? root_mean_square(group) : zero<float>();
  Fit best{};
  for (int range = 0; range < kSearch<F>.ranges; ++range) {
    Fit next = first_guess<F>(e, range);
    for (int i = 0; i <= kSearch<F>.refinements; ++i) {
      Fit refined;
      const Fit tried = evaluate<F>(group, rms, next, &refined);
      const VecInt<float> better = (range | i) ? tried.error < best.error : tried.scale == tried.scale;
      best.scale = better ? tried.scale : best.scale;
      best.minimum = better ? tried.minimum : best.minimum;
      best.error = better ? tried.error : best.error;
      next = refined;
    }
  }
  return {best.scale + e.poison, best.minimum, inverse_of(best.scale), zero<float>()};
}

// ---- rules -------------------------------------------------------------------------------------------------------

// GPTQ's: the levels span the weights and 0, which is one of them.
template <Format F>
FW_INLINE Grid grid_with_zero(Group group, Parameter parameter) {
  constexpr Range r = range_of<F>();
  const Extremes e = extremes_of(group);
  const Floats low = min(e.low, zero<float>()), high = max(e.high, zero<float>());
  Floats scale = (high - low) / (r.highest - r.lowest);
  if (parameter == Parameter::scale_zero) scale = round_float16(scale);
  const Floats inverse = inverse_of(scale), at = r.lowest + round_nearest(-low * inverse);
  return {scale + e.poison, -scale * at, inverse, at};
}

template <Format F>
FW_INLINE Grid grid_of(Group group, [[maybe_unused]] Parameter parameter) {
  if constexpr (kTraits<F>.parameter == Parameter::scale_f32) {  // the largest magnitude becomes the largest level
    const Extremes e = extremes_of(group);
    const Floats scale = max(-e.low, e.high) / range_of<F>().highest;
    return {scale + e.poison, zero<float>(), 1.0f / max(scale, set1(1e-38f)), zero<float>()};
  } else if constexpr (kTraits<F>.parameter == Parameter::scale_e8m0) {  // the largest magnitude falls into [4, 8)
    const Extremes e = extremes_of(group);
    const Words exponent = (bit_cast<Words>(max(-e.low, e.high)) >> 23) - 2;
    const Words stored = exponent < 0 ? zero<int32_t>() : exponent;
    return {power_of_two(stored) + e.poison, zero<float>(), power_of_two(254 - stored), zero<float>()};
  } else {
    if constexpr (kTraits<F>.parameter == Parameter::scale_minimum) {
      if (parameter != Parameter::scale_minimum) return grid_with_zero<F>(group, parameter);
    }
    return search<F>(group);
  }
}

// ---- bundles -----------------------------------------------------------------------------------------------------

// How scales and minima are stored where a bundle shares some: scale = d * scales[j], minimum = -dmin * minima[j].
template <Format F>
struct Shared {
  Floats d, dmin;
  Words scales[kBundle<F>], minima[kBundle<F>];
};

// Numbers as multiples of their largest magnitude / most.
FW_INLINE Words multiples(Floats v, Floats unit, float least, float most) {
  return __builtin_convertvector(min(max(round_nearest(v * inverse_of(unit)), set1(least)), set1(most)), Words);
}

FW_INLINE Floats to_floats(Words w) {
  return __builtin_convertvector(w, Floats);
}

// Rounds the grids of a bundle to what it can store.
template <Format F>
FW_INLINE Shared<F> share(Grid* grids) {
  constexpr bool k4 = kTraits<F>.parameter == Parameter::q4_k;
  Floats largest = zero<float>(), lowest = zero<float>(), poison = zero<float>();
  for (int64_t j = 0; j < kBundle<F>; ++j) {
    const Floats s = grids[j].scale;
    const VecInt<float> further = (s < 0.0f ? -s : s) > (largest < 0.0f ? -largest : largest);
    largest = further ? s : largest;
    lowest = min(grids[j].minimum, lowest);
    poison += s * 0.0f;
  }
  Shared<F> out;
  out.d = round_float16(largest / (k4 ? 63.0f : -128.0f)) + poison;
  out.dmin = round_float16(-lowest / 63.0f);
  for (int64_t j = 0; j < kBundle<F>; ++j) {
    out.scales[j] = multiples(grids[j].scale, out.d, k4 ? 0.0f : -128.0f, k4 ? 63.0f : 127.0f);
    out.minima[j] = multiples(-grids[j].minimum, out.dmin, 0.0f, 63.0f);
    grids[j].scale = out.d * to_floats(out.scales[j]);
    grids[j].minimum = -out.dmin * to_floats(out.minima[j]);
    grids[j].inverse = inverse_of(grids[j].scale);
  }
  return out;
}

}  // namespace fastweights::quantization::FW_LEVEL
