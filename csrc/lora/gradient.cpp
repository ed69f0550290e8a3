// The gradient of A or B: a product over the rows, in the order of the rows.
#include "core/gemm.h"
#include "core/scratch.h"
#include "lora/rows.h"

namespace fastweights::lora::FW_LEVEL {

template <typename S>
static void gradient_of(const GradientArgs& a, const Block& g, int64_t c_column, int64_t column) {
  using T = Compute<S>;
  constexpr int64_t N = kGradientColumns;
  if (g.ranks == 0) return;
  const int64_t columns = a.in.columns - column < N ? a.in.columns - column : N;
  Scratch scratch(Scratch::take_bytes<T>(kGradientRows * N) + Scratch::take_bytes<T>(kGradientRows * g.ranks) +
                  Scratch::take_bytes<T>(g.ranks * N));
  T* in = scratch.take<T>(kGradientRows * N);
  T* c = scratch.take<T>(kGradientRows * g.ranks);
  T* sums = scratch.take<T>(g.ranks * N);
  for (int64_t i = 0; i < g.ranks * N; i += kLanes<T>) store(sums + i, zero<T>());
  for (int64_t first = 0; first < g.count; first += kGradientRows) {
    const int64_t rows = g.count - first < kGradientRows ? g.count - first : kGradientRows;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t m = row_number(a.order, g.first + first + i);
      const S* x = row_of<const S>(a.in, m) + column;
      const uint64_t key = a.in_dropout.on ? row_key(a.in_dropout, m) : 0;
      T* row = in + i * N;
      for (int64_t j = columns / kLanes<T> * kLanes<T>; j < N; j += kLanes<T>) store(row + j, zero<T>());
      for_vectors<T>(columns, [&](int64_t j, auto part) {
        Vec<T> v = load_as(x + j, part);
        if (a.in_dropout.on) v *= keep<T>(a.in_dropout, key, column + j);
        store(row + j, v);
      });
      __builtin_memcpy(c + i * g.ranks, row_of<const T>(a.c, m) + c_column, size_t(g.ranks) * sizeof(T));
    }
    gemm<T>(g.ranks, N, rows, c, 1, g.ranks, in, N, sums, N, true);
  }
  for (int64_t r = 0; r < g.ranks; ++r) {
    const Vec<T> factor = set1(T(a.factors[g.rank + r]));
    T* out = row_of<T>(a.out, g.rank + r) + column;
    for_vectors<T>(columns, [&](int64_t j, auto part) { store_as(out + j, load(sums + r * N + j) * factor, part); });
  }
}

void gradient(const GradientArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.element, [&]<typename S>(S) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / a.strips;
      gradient_of<S>(a, a.groups[g], a.c_columns[g], task % a.strips * kGradientColumns);
    }
  });
}

}  // namespace fastweights::lora::FW_LEVEL
