// The end of both matmuls: sums of one strip, [rows][16], plus bias and residual, stored in the dtype of y.
#pragma once

#include "quantization/line.h"

namespace fastweights::quantization::FW_LEVEL {

template <typename T, typename S>
static Vec<T> bias_or_residual(const S* p, int64_t n) {
  if constexpr (sizeof(Compute<S>) == sizeof(T)) {
    return n == kLanes<T> ? load_as(p) : load_as(p, n);
  } else {
    Vec<T> v = zero<T>();
    for (int64_t i = 0; i < n; ++i) v[i] = T(to_compute(p[i]));
    return v;
  }
}

template <typename S>
static void store_sums(S* p, Vec<Compute<S>> v, int64_t n) {
  n == kLanes<Compute<S>> ? store_as(p, v) : store_as(p, v, n);
}

// n <= lanes elements of type `element` as T.
template <typename T>
static Vec<T> load_element(Element element, const void* p, int64_t offset, int64_t n) {
  switch (element) {
    case Element::bf16:
      return bias_or_residual<T>(static_cast<const bfloat16*>(p) + offset, n);
    case Element::f16:
      return bias_or_residual<T>(static_cast<const float16*>(p) + offset, n);
    case Element::f64:
      return bias_or_residual<T>(static_cast<const double*>(p) + offset, n);
    default:
      return bias_or_residual<T>(static_cast<const float*>(p) + offset, n);
  }
}

template <typename T>
static void store_element(Element element, void* p, int64_t offset, Vec<T> v, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    if (element == Element::bf16) return store_sums(static_cast<bfloat16*>(p) + offset, v, n);
    if (element == Element::f16) return store_sums(static_cast<float16*>(p) + offset, v, n);
    if (element == Element::f32) return store_sums(static_cast<float*>(p) + offset, v, n);
    for (int64_t i = 0; i < n; ++i) static_cast<double*>(p)[offset + i] = double(v[i]);
  } else {
    store_sums(static_cast<double*>(p) + offset, v, n);
  }
}

template <typename T>
static void finish_strip(const MatmulArgs& a, const T* sums, int64_t row, int64_t rows, int64_t strip) {
  constexpr int L = kLanes<T>;
  for (int64_t lane = 0; lane < kStrip; lane += L) {
    const int64_t n0 = strip * kStrip + lane, left = a.weight.N - n0;
    if (left <= 0) return;
    const int64_t n = left < L ? left : L;
    const Vec<T> bias = a.bias ? load_element<T>(a.bias_element, a.bias, n0, n) : zero<T>();
    for (int64_t m = row; m < row + rows; ++m) {
      Vec<T> y = load(sums + (m - row) * kStrip + lane) + bias;
      if (a.residual) y += load_element<T>(a.element, a.residual, m * a.residual_stride + n0, n);
      store_element<T>(a.element, a.y, m * a.y_stride + n0, y, n);
    }
  }
}

}  // namespace fastweights::quantization::FW_LEVEL
