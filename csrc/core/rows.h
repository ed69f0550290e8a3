// Rows between tensors and the kernels' own memory, where they are in the type of the arithmetic and padded with zeros
// to whole vectors.
#pragma once

#include "core/recurrence.h"
#include "core/vec.h"

namespace fastweights::FW_LEVEL {

template <typename T>
FW_INLINE int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

FW_INLINE int64_t size_of(Element e) {
  return e == Element::f64 ? 8 : e == Element::f32 ? 4 : 2;
}

template <typename S>
FW_INLINE void load_elements(const S* in, int64_t n, Compute<S> factor, Compute<S>* out) {
  constexpr int L = kLanes<Compute<S>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(out + i, load_as(in + i) * factor);
  if (i < n) store(out + i, load_as(in + i, n - i) * factor);
}

template <typename S>
FW_INLINE void store_elements(S* out, int64_t n, const Compute<S>* in) {
  constexpr int L = kLanes<Compute<S>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store_as(out + i, load(in + i));
  if (i < n) store_as(out + i, load(in + i), n - i);
}

// out[0, padded(n)) = factor * row, zeros behind n.
template <typename T>
FW_INLINE void load_row(const Rows& r, int64_t offset, int64_t n, T factor, T* out) {
  if constexpr (sizeof(T) == sizeof(double)) {
    load_elements(static_cast<const double*>(r.data) + offset, n, factor, out);
  } else if (r.element == Element::f32) {
    load_elements(static_cast<const float*>(r.data) + offset, n, factor, out);
  } else if (r.element == Element::bf16) {
    load_elements(static_cast<const bfloat16*>(r.data) + offset, n, factor, out);
  } else {
    load_elements(static_cast<const float16*>(r.data) + offset, n, factor, out);
  }
}

template <typename T>
FW_INLINE void store_row(const Rows& r, int64_t offset, int64_t n, const T* in) {
  if constexpr (sizeof(T) == sizeof(double)) {
    store_elements(static_cast<double*>(r.data) + offset, n, in);
  } else if (r.element == Element::f32) {
    store_elements(static_cast<float*>(r.data) + offset, n, in);
  } else if (r.element == Element::bf16) {
    store_elements(static_cast<bfloat16*>(r.data) + offset, n, in);
  } else {
    store_elements(static_cast<float16*>(r.data) + offset, n, in);
  }
}

// a . b, a sum for each lane; n is a multiple of the lane count.
template <typename T>
FW_INLINE Vec<T> product_sums(const T* a, const T* b, int64_t n) {
  Vec<T> sum = zero<T>();
  for (int64_t j = 0; j < n; j += kLanes<T>) sum = fma(load(a + j), load(b + j), sum);
  return sum;
}

template <typename T>
FW_INLINE T dot(const T* a, const T* b, int64_t n) {
  return reduce_add<T>(product_sums(a, b, n));
}

}  // namespace fastweights::FW_LEVEL
