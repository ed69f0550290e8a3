// exp, log, sigmoid, softplus, tanh on vectors. Error bounds (ulp, float) are tested at every level:
// exp 1.5, log 2, sigmoid 3, softplus 3, tanh 3. Double goes to libm lane by lane: it is the path of gradcheck.
#pragma once

#include "core/vec.h"

namespace fastweights::FW_LEVEL {

template <typename V>
FW_INLINE V abs(V x) {
  return x < 0 ? -x : x;
}

// 2^n for integer n in [-126, 127].
FW_INLINE Vec<float> exp2_int(Vec<int32_t> n) {
  return bit_cast<Vec<float>>((n + 127) << 23);
}

FW_INLINE Vec<float> exp(Vec<float> x) {
  // Beyond these bounds the result is 0 or infinity; clamping keeps n representable. max/min written so that NaN
  // passes.
  const Vec<float> lo = set1(-104.0f), hi = set1(89.0f);
  Vec<float> c = x < lo ? lo : x;
  c = c > hi ? hi : c;
  const Vec<float> magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec<float> n = (c * set1(1.44269504f) + magic) - magic;
  Vec<float> r = fma(n, set1(-0.693359375f), c);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec<float> p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p * r, r, r) + 1.0f;
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(n)));
#else
  // Two factors, since 2^n itself is not a normal float at either end. NaN converts to some integer; p is NaN anyway.
  const Vec<int32_t> whole = __builtin_convertvector(n == n ? n : zero<float>(), Vec<int32_t>);
  const Vec<int32_t> half = whole >> 1;
  return p * exp2_int(half) * exp2_int(whole - half);
#endif
}

FW_INLINE Vec<float> log(Vec<float> x) {
  const Vec<float> inf = set1(__builtin_inff());
  const Vec<int32_t> tiny = x < set1(1.17549435e-38f);
  const Vec<float> scaled = tiny ? x * 8388608.0f : x;
  const Vec<int32_t> bits = bit_cast<Vec<int32_t>>(scaled);
  // m in [sqrt(1/2), sqrt(2)), so that log m keeps its relative accuracy around 1.
  const Vec<int32_t> offset = bits - 0x3f3504f3;
  Vec<int32_t> e = offset >> 23;
  const Vec<float> m = bit_cast<Vec<float>>(bits - (e << 23));
  e = tiny ? e - 23 : e;
  const Vec<float> k = __builtin_convertvector(e, Vec<float>);
  const Vec<float> f = m - 1.0f;
  Vec<float> p = set1(7.0376836292e-2f);
  p = fma(p, f, set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  const Vec<float> z = f * f;
  Vec<float> y = p * f * z;
  y = fma(k, set1(-2.12194440e-4f), y);
  y = fma(z, set1(-0.5f), y);
  y = f + y;
  y = fma(k, set1(0.693359375f), y);
  y = x == inf ? inf : y;
  y = x == 0.0f ? -inf : y;
  y = x < 0.0f ? set1(__builtin_nanf("")) : y;
  return x == x ? y : x;
}

// log(1 + t) for t >= 0: the rounding error of 1 + t is put back.
FW_INLINE Vec<float> log1p_positive(Vec<float> t) {
  const Vec<float> u = 1.0f + t;
  return log(u) + (t - (u - 1.0f)) / u;
}

FW_INLINE Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> t = exp(-abs(x));
  const Vec<float> s = 1.0f / (1.0f + t);
  return x < 0.0f ? t * s : s;
}

FW_INLINE Vec<float> softplus(Vec<float> x) {
  return (x > 0.0f ? x : zero<float>()) + log1p_positive(exp(-abs(x)));
}

FW_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> a = abs(x);
  const Vec<float> large = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  const Vec<float> z = x * x;
  Vec<float> p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const Vec<float> small = fma(p * z, x, x);
  return a < 0.625f ? small : (x < 0.0f ? -large : large);
}

#define FW_LANEWISE(name, scalar)                                 \
  FW_INLINE Vec<double> name(Vec<double> x) {                     \
    Vec<double> y;                                                \
    for (int i = 0; i < kLanes<double>; ++i) y[i] = scalar(x[i]); \
    return y;                                                     \
  }
FW_LANEWISE(exp, __builtin_exp)
FW_LANEWISE(log, __builtin_log)
FW_LANEWISE(tanh, __builtin_tanh)
#undef FW_LANEWISE

FW_INLINE Vec<double> sigmoid(Vec<double> x) {
  return 1.0 / (1.0 + exp(-x));
}

FW_INLINE Vec<double> softplus(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) {
    const double t = __builtin_exp(x[i] < 0 ? x[i] : -x[i]);
    y[i] = (x[i] > 0 ? x[i] : 0.0) + __builtin_log1p(t);
  }
  return y;
}

// Of a number below -88 the exponential overflows, which makes the quotient the zero that it should be.
FW_INLINE Vec<float> silu(Vec<float> x) {
  return x / (1.0f + exp(-x));
}
FW_INLINE Vec<double> silu(Vec<double> x) {
  return x / (1.0 + exp(-x));
}

// From s = sigmoid(x).
template <typename V>
FW_INLINE V silu_derivative(V x, V s) {
  return fma(x * s, V{} + 1 - s, s);
}

FW_INLINE float exp(float x) {
  return exp(set1(x))[0];
}
FW_INLINE double exp(double x) {
  return __builtin_exp(x);
}

template <typename T>
FW_INLINE T reciprocal_root(T x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return 1 / __builtin_sqrt(x);
  } else {
    return 1 / __builtin_sqrtf(x);
  }
}

}  // namespace fastweights::FW_LEVEL
