// Rows of a matrix to columns of another, with a factor and a change of type on the way.
#pragma once

#include "core/product.h"
#include "lora/rows.h"

namespace fastweights::lora::FW_LEVEL {

template <typename T>
FW_INLINE int64_t part_of(int64_t n) {
  return n < kLanes<T> ? n : kLanes<T>;
}

template <typename From, typename To>
static __attribute__((noinline)) void transpose_rows(const TransposeArgs& t, int64_t begin, int64_t end) {
  using T = Compute<From>;
  constexpr int L = kLanes<T>;
  const Vec<T> factor = set1(T(t.factor));
  for (int64_t j = 0; j < t.in.columns; j += L) {
    const int64_t columns = part_of<T>(t.in.columns - j);
    for (int64_t i = begin; i < end; i += L) {
      const int64_t rows = part_of<T>(end - i);
      Vec<T> r[L];
      for (int n = 0; n < L; ++n) {
        if (n >= rows) {
          r[n] = zero<T>();
        } else if (columns == L) {
          r[n] = load_as(row_of<const From>(t.in, i + n) + j) * factor;
        } else {
          r[n] = load_as(row_of<const From>(t.in, i + n) + j, columns) * factor;
        }
      }
      ::fastweights::FW_LEVEL::transpose<T>(r);
      for (int64_t n = 0; n < columns; ++n) {
        To* out = row_of<To>(t.out, j + n) + i;
        if (rows == L) {
          store_as(out, r[n]);
        } else {
          store_as(out, r[n], rows);
        }
      }
    }
  }
}

}  // namespace fastweights::lora::FW_LEVEL
