// Decays between the tokens of a chunk as running products: never a quotient, so that no gate overflows.
#pragma once

#include "core/product.h"
#include "core/rows.h"

namespace fastweights::FW_LEVEL {

// Decays below the smallest normal number are zero: what follows would be slow and mean nothing.
template <typename T>
FW_INLINE Vec<T> flush(Vec<T> x) {
  constexpr T tiny = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);
  return x < tiny ? zero<T>() : x;
}

// prefix[i] = decay[0] ... decay[i], suffix[i] = decay[i + 1] ... decay[n - 1]; returns the product of all.
template <typename T>
FW_INLINE T running_products(int64_t n, const T* decay, T* prefix, T* suffix) {
  T product = T(1);
  for (int64_t i = n - 1; i >= 0; --i) {
    suffix[i] = product;
    product *= decay[i];
  }
  product = T(1);
  for (int64_t i = 0; i < n; ++i) prefix[i] = product *= decay[i];
  return product;
}

// The same for each of Kp channels, in rows.
template <typename T>
FW_INLINE void running_products(int64_t n, int64_t Kp, const T* decay, T* prefix, T* suffix, T* total) {
  for (int64_t j = 0; j < Kp; j += kLanes<T>) {
    Vec<T> product = set1(T(1));
    for (int64_t i = n - 1; i >= 0; --i) {
      store(suffix + i * Kp + j, product);
      product = flush<T>(product * load(decay + i * Kp + j));
    }
    product = set1(T(1));
    for (int64_t i = 0; i < n; ++i) {
      product = flush<T>(product * load(decay + i * Kp + j));
      store(prefix + i * Kp + j, product);
    }
    store(total + j, product);
  }
}

// out[i] = factor[i] * in[i] for rows of Kp: one factor a row, or one an element.
template <typename T>
FW_INLINE void scale_rows(int64_t n, int64_t Kp, const T* factor, const T* in, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < Kp; j += kLanes<T>) store(out + i * Kp + j, load(in + i * Kp + j) * set1(factor[i]));
  }
}

template <typename T>
FW_INLINE void scale_elements(int64_t n, int64_t Kp, const T* factor, const T* in, T* out) {
  for (int64_t i = 0; i < n * Kp; i += kLanes<T>) store(out + i, load(factor + i) * load(in + i));
}

// P[i, j] times the decays of tokens j + 1 to i, zero above the diagonal in the vectors that hold it.
template <typename T>
FW_INLINE void decay_triangle(int64_t n, const T* decay, T* P, int64_t ld) {
  constexpr int L = kLanes<T>;
  VecInt<T> lane{};
  for (int x = 0; x < L; ++x) lane[x] = x;
  for (int64_t j = 0; j < n; j += L) {
    Vec<T> w = zero<T>();
    for (int64_t i = j; i < n; ++i) {
      w = flush<T>(w * set1(decay[i]));
      w = lane == VecInt<T>{} + (typename IntOf<T>::type)(i - j) ? set1(T(1)) : w;
      T* at = P + i * ld + j;
      store(at, lane > VecInt<T>{} + (typename IntOf<T>::type)(i - j) ? zero<T>() : load(at) * w);
    }
  }
}

// PT[j, i] = sum over channels of q[i] k[j] times the channel's decays of tokens j + 1 to i, for j <= i. `part` has
// room for a vector per row, a multiple of the lane count of them.
template <typename T>
FW_INLINE void channel_triangle(int64_t n, int64_t Kp, const T* q, const T* k, const T* decay, T* PT, int64_t ld,
                                T* part) {
  constexpr int L = kLanes<T>, W = 4;
  const int64_t np = padded<T>(n);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < np; ++i) store(part + i * L, zero<T>());
    int64_t c = 0;
    for (; c + W * L <= Kp; c += W * L) {
      Vec<T> w[W];
      FW_UNROLL
      for (int x = 0; x < W; ++x) w[x] = load(k + j * Kp + c + x * L);
      for (int64_t i = j; i < n; ++i) {
        Vec<T> sum = load(part + i * L);
        FW_UNROLL
        for (int x = 0; x < W; ++x) {
          if (i > j) w[x] = w[x] * load(decay + i * Kp + c + x * L);
          sum = fma(w[x], load(q + i * Kp + c + x * L), sum);
        }
        store(part + i * L, sum);
      }
    }
    for (; c < Kp; c += L) {
      Vec<T> w = load(k + j * Kp + c);
      for (int64_t i = j; i < n; ++i) {
        if (i > j) w = w * load(decay + i * Kp + c);
        store(part + i * L, fma(w, load(q + i * Kp + c), load(part + i * L)));
      }
    }
    for (int64_t i = j / L * L; i < np; i += L) store(PT + j * ld + i, reduce_each<T>(part + i * L));
  }
}

// What the triangle of the channels passes on: with W[i, j] the channel's decays of tokens j + 1 to i and dP the
// gradient of the weights, dq[i] += sum over j of dP[i, j] k[j] W[i, j] and dk[j] += sum over i of dP[i, j] q[i] W[i,
// j].
template <typename T>
FW_INLINE void channel_triangle_backward(int64_t n, int64_t Kp, const T* q, const T* k, const T* decay, const T* dP,
                                         int64_t ld, T* dq, T* dk) {
  for (int64_t c = 0; c < Kp; c += kLanes<T>) {
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> key = load(k + j * Kp + c);
      Vec<T> w = set1(T(1)), sum = load(dk + j * Kp + c);
      for (int64_t i = j; i < n; ++i) {
        if (i > j) w = flush<T>(w * load(decay + i * Kp + c));
        const Vec<T> weight = w * set1(dP[i * ld + j]);
        store(dq + i * Kp + c, fma(weight, key, load(dq + i * Kp + c)));
        sum = fma(weight, load(q + i * Kp + c), sum);
      }
      store(dk + j * Kp + c, sum);
    }
  }
}

}  // namespace fastweights::FW_LEVEL
