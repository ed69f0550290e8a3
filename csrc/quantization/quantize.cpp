// Round to nearest with a search for scale and minimum. Lanes are the outputs of a strip, so every step is vertical.
//
// From ranges shrunk by several factors, alternate between nearest codes and the least-squares (scale, minimum) for
// those codes; keep what gives the smallest squared error after scale and minimum are rounded to float16. The plain
// range comes first, so a weight that lies on a grid of this kind is reproduced.
#include "core/scratch.h"
#include "quantization/line.h"

namespace fastweights::quantization::FW_LEVEL {

template <Format F>
struct Codes;
template <>
struct Codes<Format::int4> {
  static constexpr float lowest = 0, highest = 15;
  static constexpr int shrinks = 7, refinements = 2;
};
template <>
struct Codes<Format::int8> {
  static constexpr float lowest = -127, highest = 127;
  static constexpr int shrinks = 1, refinements = 0;
};

using Floats = Vec<float>;

FW_INLINE Floats round_float16(Floats v) {
  return widen(narrow(v, float16{}), float16{});
}

FW_INLINE Floats round_nearest(Floats v) {
  return (v + 12582912.0f) - 12582912.0f;
}

struct Fit {
  Floats scale, minimum, error;
};

template <Format F>
FW_INLINE Floats nearest_code(Floats w, Floats inverse, Floats minimum) {
  const Floats lowest = set1(Codes<F>::lowest), highest = set1(Codes<F>::highest);
  return round_nearest(min(max((w - minimum) * inverse, lowest), highest));
}

// Scale 0 stands for a group of equal weights: code 0 (or the lowest) and the minimum say it all.
FW_INLINE Floats inverse_of(Floats scale) {
  return scale == 0.0f ? zero<float>() : 1.0f / scale;
}

// The error of (scale, minimum) over n weights w[i * 16], and the least-squares pair for the codes that they give.
template <Format F>
FW_INLINE Fit evaluate(const float* w, int64_t n, Floats scale, Floats minimum, Fit* refined) {
  scale = round_float16(scale);
  minimum = round_float16(minimum);
  const Floats inverse = inverse_of(scale);
  Floats error = zero<float>(), c1 = error, c2 = error, w1 = error, wc = error;
  for (int64_t i = 0; i < n; ++i) {
    const Floats x = load(w + i * kStrip), c = nearest_code<F>(x, inverse, minimum);
    const Floats d = x - fma(scale, c, minimum);
    error = fma(d, d, error);
    c1 += c;
    c2 = fma(c, c, c2);
    w1 += x;
    wc = fma(x, c, wc);
  }
  const Floats count = set1(float(n)), determinant = count * c2 - c1 * c1;
  refined->scale = determinant > 0.0f ? (count * wc - c1 * w1) / determinant : zero<float>();
  refined->minimum = (w1 - refined->scale * c1) / count;
  return {scale, minimum, error};
}

template <Format F>
FW_INLINE Fit fit_group(const float* w, int64_t n) {
  Floats low = load(w), high = low, poison = zero<float>();  // poison: NaN if a weight is NaN or infinite, else 0
  for (int64_t i = 0; i < n; ++i) {
    const Floats x = load(w + i * kStrip);
    low = min(x, low);
    high = max(x, high);
    poison += x * 0.0f;
  }
  constexpr float levels = Codes<F>::highest - Codes<F>::lowest;
  const Floats middle = 0.5f * (low + high), center = set1(0.5f * (Codes<F>::lowest + Codes<F>::highest));
  Fit best{};
  for (int shrink = 0; shrink < Codes<F>::shrinks; ++shrink) {
    const Floats scale = (high - low) / (levels * (1.0f + float(shrink) / 18.0f));
    Fit next{scale, shrink ? middle - scale * center : low - scale * Codes<F>::lowest, zero<float>()};
    for (int i = 0; i <= Codes<F>::refinements; ++i) {
      Fit refined;
      const Fit tried = evaluate<F>(w, n, next.scale, next.minimum, &refined);
      const VecInt<float> better = (shrink | i) ? tried.error < best.error : tried.scale == tried.scale;
      best.scale = better ? tried.scale : best.scale;
      best.minimum = better ? tried.minimum : best.minimum;
      best.error = better ? tried.error : best.error;
      next = refined;
    }
  }
  best.scale += poison;
  return best;
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

template <Format F>
static void pack_group(const float* w, int64_t n, int64_t group, uint8_t* out) {
  float16* parameters = reinterpret_cast<float16*>(out + group / kLineInputs<F> * kLine);
  __builtin_memset(out, 0, size_t(group / kLineInputs<F> * kLine));
  for (int part = 0; part < kParts; ++part) {
    const int first = part * kWords;
    const Fit fit = fit_group<F>(w + first, n);
    store_as(parameters + first, fit.scale);
    store_as(parameters + kStrip + first, fit.minimum);
    const Floats inverse = inverse_of(fit.scale);
    for (int64_t k = 0; k < n; ++k) {
      const Words code =
          __builtin_convertvector(nearest_code<F>(load(w + k * kStrip + first), inverse, fit.minimum), Words);
      const int64_t line = k / kLineInputs<F>, t = k % 4, high = F == Format::int4 ? k / 4 % 2 : 0;
      for (int lane = 0; lane < kWords; ++lane) {
        out[line * kLine + (first + lane) * 4 + t] |= uint8_t(code[lane] << (4 * high));
      }
    }
  }
}

template <typename S>
static void quantize_strip(const QuantizeArgs& a, int64_t strip, float* w) {
  const Weight& q = a.weight;
  for (int64_t g = 0; g < q.groups; ++g) {
    const int64_t k = g * q.group, n = q.K - k < q.group ? q.K - k : q.group;
    uint8_t* out = a.packed + strip * q.strip_bytes + g * q.group_bytes;
    load_group<S>(a, strip, k, n, w);
    q.format == Format::int4 ? pack_group<Format::int4>(w, n, q.group, out)
                             : pack_group<Format::int8>(w, n, q.group, out);
  }
}

void quantize(const QuantizeArgs& a, int64_t begin, int64_t end) noexcept {
  Scratch scratch(Scratch::take_bytes<float>(a.weight.group * kStrip));
  float* w = scratch.take<float>(a.weight.group * kStrip);
  for (int64_t strip = begin; strip < end; ++strip) {
    switch (a.element) {
      case Element::f32:
        quantize_strip<float>(a, strip, w);
        break;
      case Element::bf16:
        quantize_strip<bfloat16>(a, strip, w);
        break;
      case Element::f16:
        quantize_strip<float16>(a, strip, w);
        break;
      case Element::f64:
        quantize_strip<double>(a, strip, w);
        break;
    }
  }
}

}  // namespace fastweights::quantization::FW_LEVEL
