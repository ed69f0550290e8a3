// Rows of a matrix, with and without dropout.
#pragma once

#include "core/element.h"
#include "core/random.h"
#include "core/tail.h"
#include "lora/kernel.h"

namespace fastweights::lora::FW_LEVEL {
using namespace ::fastweights::FW_LEVEL;

template <typename S>
FW_INLINE S* row_of(const Matrix& m, int64_t i) {
  return static_cast<S*>(m.data) + i * m.stride;
}

FW_INLINE int64_t row_number(const int64_t* order, int64_t i) {
  return order ? order[i] : i;
}

FW_INLINE uint64_t row_key(const Dropout& d, int64_t row) {
  return mixed(d.seed + 0x9e3779b97f4a7c15u * uint64_t(row + 1));
}

template <typename T, typename V, int... I>
FW_INLINE Vec<T> first_lanes(V v, Lanes<I...>) {
  return __builtin_convertvector(__builtin_shufflevector(v, v, I...), Vec<T>);
}

// 0 or the factor, for the columns j, j + 1, ...
template <typename T>
FW_INLINE Vec<T> keep(const Dropout& d, uint64_t key, int64_t j) {
  const Vec<uint32_t> bits = random_bits(key, j);
  if constexpr (sizeof(T) == sizeof(float)) {
    return bits < d.threshold ? set1(T(d.factor)) : zero<T>();
  } else {
    const Vec<T> numbers = first_lanes<T>(bits, typename LanesUpTo<kLanes<T>>::type{});
    return numbers < set1(T(d.threshold)) ? set1(T(d.factor)) : zero<T>();
  }
}

}  // namespace fastweights::lora::FW_LEVEL
