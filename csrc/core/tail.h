// Loops over vectors of which the last may be partial, written once: f(j, part) loads and stores through `part`, a
// whole vector as one instruction.
#pragma once

#include "core/vec.h"

namespace fastweights::FW_LEVEL {

struct Whole {};

template <typename S>
FW_INLINE Vec<Compute<S>> load_as(const S* p, Whole) {
  return load_as(p);
}

template <typename S>
FW_INLINE void store_as(S* p, Vec<Compute<S>> v, Whole) {
  store_as(p, v);
}

// f(j, part) for the vectors of n elements in the type T; part is Whole, or the count of the rest.
template <typename T, typename F>
FW_INLINE void for_vectors(int64_t n, const F& f) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  for (; j + L <= n; j += L) f(j, Whole{});
  if (j < n) f(j, n - j);
}

}  // namespace fastweights::FW_LEVEL
