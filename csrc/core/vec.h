// SIMD vocabulary on compiler vector extensions. One source, compiled once per CPU level: FW_LEVEL names the level
// and the namespace, the lane count follows from the instruction set the file is compiled for.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FW_LEVEL
#error "compile kernel files through CMake, which defines FW_LEVEL"
#endif

#define FW_INLINE static inline __attribute__((always_inline))
#define FW_UNROLL _Pragma("GCC unroll 32")

namespace fastweights {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace FW_LEVEL {

// FW_WIDE builds 64-byte vectors out of whatever the machine has, so that the code of the AVX-512 levels, tiles and
// tails included, runs and is tested on machines without AVX-512.
#if defined(__AVX512F__) || defined(FW_WIDE)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <typename T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
  typedef T unaligned __attribute__((vector_size(sizeof(T) * N), aligned(sizeof(T)), may_alias));
};

// A vector register of T.
template <typename T>
using Vec = typename VecOf<T, kLanes<T>>::type;

template <typename T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <typename T>
using VecInt = Vec<typename IntOf<T>::type>;

template <typename To, typename From>
FW_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(To));
  return y;
}

template <typename T>
FW_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T, kLanes<T>>::unaligned*>(p);
}

template <typename T>
FW_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T, kLanes<T>>::unaligned*>(p) = v;
}

// A lane list, not `zero + x`: that sum is kept by the compiler (signed zeros) and costs an add per broadcast.
template <typename T>
FW_INLINE Vec<T> set1(T x) {
  constexpr int n = kLanes<T>;
  if constexpr (n == 2) {
    return Vec<T>{x, x};
  } else if constexpr (n == 4) {
    return Vec<T>{x, x, x, x};
  } else if constexpr (n == 8) {
    return Vec<T>{x, x, x, x, x, x, x, x};
  } else {
    static_assert(n == 16);
    return Vec<T>{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
  }
}

template <typename T>
FW_INLINE Vec<T> zero() {
  return Vec<T>{};
}

// Contracted to one instruction where the level has it (-ffp-contract=fast).
template <typename V>
FW_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

template <typename V>
FW_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

template <typename V>
FW_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

template <int... I>
struct Lanes {};
template <int N, int... I>
struct LanesUpTo : LanesUpTo<N - 1, N - 1, I...> {};
template <int... I>
struct LanesUpTo<0, I...> {
  using type = Lanes<I...>;
};

// One half of the lanes with the other, until one is left: the same order at every call, whatever the compiler makes of
// it.
template <int H, typename V, typename F, int... I>
FW_INLINE V fold_halves(V v, const F& f, Lanes<I...> all) {
  v = f(v, V(__builtin_shufflevector(v, v, (I ^ H)...)));
  if constexpr (H > 1) return fold_halves<H / 2>(v, f, all);
  return v;
}

template <typename T>
FW_INLINE T reduce_add(Vec<T> v) {
  const auto sum = [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; };
  return fold_halves<kLanes<T> / 2>(v, sum, typename LanesUpTo<kLanes<T>>::type{})[0];
}

template <typename T>
FW_INLINE T reduce_max(Vec<T> v) {
  const auto larger = [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return max(a, b); };
  return fold_halves<kLanes<T> / 2>(v, larger, typename LanesUpTo<kLanes<T>>::type{})[0];
}

// ---- bfloat16, float16 -------------------------------------------------------------------------------------------

using Half16 = typename VecOf<uint16_t, kLanes<float>>::type;

FW_INLINE Vec<float> widen(Half16 h, bfloat16) {
  return bit_cast<Vec<float>>(__builtin_convertvector(h, Vec<uint32_t>) << 16);
}

FW_INLINE Half16 narrow(Vec<float> v, bfloat16) {
  const Vec<uint32_t> u = bit_cast<Vec<uint32_t>>(v);
  const Vec<uint32_t> rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Vec<uint32_t> quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector((v == v) ? rounded : quiet, Half16);
}

FW_INLINE float widen_scalar(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
  const float tiny = float(rest) * 0x1p-24f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(tiny));
}

FW_INLINE uint16_t narrow_scalar(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (rest < 0x38800000u) {
    // Adding one half of the float spacing at 2^-24 rounds the subnormal to nearest even in hardware.
    const float shifted = bit_cast<float>(rest) + 0.5f;
    return uint16_t(sign | uint16_t(bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  return uint16_t(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

FW_INLINE Vec<float> widen(Half16 h, float16) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(h)));
#elif defined(__F16C__) && !defined(FW_WIDE)
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen_scalar(h[i]);
  return v;
#endif
}

FW_INLINE Half16 narrow(Vec<float> v, float16) {
#if defined(__AVX512F__)
  return bit_cast<Half16>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && !defined(FW_WIDE)
  return bit_cast<Half16>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  Half16 h;
  for (int i = 0; i < kLanes<float>; ++i) h[i] = narrow_scalar(v[i]);
  return h;
#endif
}

// ---- loads and stores that convert between the stored type and the type of the arithmetic -------------------------

// What a stored element is computed in: float for bfloat16, float16 and float, double for double.
template <typename S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename S>
using Compute = typename ComputeOf<S>::type;

template <typename S>
FW_INLINE Vec<Compute<S>> load_as(const S* p) {
  if constexpr (sizeof(S) == 2) {
    return widen(*reinterpret_cast<const typename VecOf<uint16_t, kLanes<float>>::unaligned*>(p), S{});
  } else {
    return load(p);
  }
}

template <typename S>
FW_INLINE void store_as(S* p, Vec<Compute<S>> v) {
  if constexpr (sizeof(S) == 2) {
    *reinterpret_cast<typename VecOf<uint16_t, kLanes<float>>::unaligned*>(p) = narrow(v, S{});
  } else {
    store(p, v);
  }
}

// Registers with a mask for every lane load and store parts of vectors as one instruction; sanitizers see only the
// bytes of a memcpy.
#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__SANITIZE_ADDRESS__)
#define FW_MASKED 1
#else
#define FW_MASKED 0
#endif

// The first n lanes; the others are zero. 0 <= n <= lanes. Nothing beyond p[n - 1] is touched.
template <typename S>
FW_INLINE Vec<Compute<S>> load_as(const S* p, int64_t n) {
#if FW_MASKED
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(S) == 8) {
    return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(__mmask8(mask), p));
  } else if constexpr (sizeof(S) == 4) {
    return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16(mask), p));
  } else {
    return widen(bit_cast<Half16>(_mm256_maskz_loadu_epi16(__mmask16(mask), p)), S{});
  }
#else
  S lane[kLanes<Compute<S>>] = {};
  __builtin_memcpy(lane, p, size_t(n) * sizeof(S));
  return load_as(lane);
#endif
}

template <typename S>
FW_INLINE void store_as(S* p, Vec<Compute<S>> v, int64_t n) {
#if FW_MASKED
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(S) == 8) {
    _mm512_mask_storeu_pd(p, __mmask8(mask), bit_cast<__m512d>(v));
  } else if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(mask), bit_cast<__m512>(v));
  } else {
    _mm256_mask_storeu_epi16(p, __mmask16(mask), bit_cast<__m256i>(narrow(v, S{})));
  }
#else
  S lane[kLanes<Compute<S>>];
  store_as(lane, v);
  __builtin_memcpy(p, lane, size_t(n) * sizeof(S));
#endif
}

template <typename S>
FW_INLINE Compute<S> to_compute(S x) {
  if constexpr (sizeof(S) == 2) {
    Half16 h{};
    h[0] = x.bits;
    return widen(h, S{})[0];
  } else {
    return x;
  }
}

template <typename S>
FW_INLINE S from_compute(Compute<S> x) {
  if constexpr (sizeof(S) == 2) {
    return S{narrow(set1(x), S{})[0]};
  } else {
    return x;
  }
}

// acc[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1] on pairs of bfloat16 held in 32 bits.
FW_INLINE Vec<float> dot2_bf16(Vec<float> acc, Vec<uint32_t> a, Vec<uint32_t> b) {
#if defined(__AVX512BF16__)
  return bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(acc), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
#else
  const Vec<float> a1 = bit_cast<Vec<float>>(a & 0xffff0000u), b1 = bit_cast<Vec<float>>(b & 0xffff0000u);
  const Vec<float> a0 = bit_cast<Vec<float>>(a << 16), b0 = bit_cast<Vec<float>>(b << 16);
  return fma(a1, b1, fma(a0, b0, acc));
#endif
}

// Pull one cache line towards L1.
FW_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p);
}

}  // namespace FW_LEVEL
}  // namespace fastweights
