// The update of a block of rows: both products while its rows are in the cache, c between them.
#include "lora/shrink.h"

namespace fastweights::lora::FW_LEVEL {

constexpr int64_t kStripBytes = 16 << 10;

// out[i, j] += sum over r of c[i, r] up[r, j] for NV vectors of columns; rounded once.
template <typename S, int MR, int NV, typename T, typename Part>
static __attribute__((noinline)) void add(T* const* c, const T* const* up, int64_t ranks, int64_t j, Part part,
                                          const Dropout& dropout, const uint64_t* keys, S* const* out) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[MR][NV];
  FW_UNROLL
  for (int i = 0; i < MR; ++i) {
    FW_UNROLL
    for (int v = 0; v < NV; ++v) sum[i][v] = zero<T>();
  }
  for (int64_t r = 0; r < ranks; ++r) {
    Vec<T> u[NV];
    FW_UNROLL
    for (int v = 0; v < NV; ++v) u[v] = load_as(up[r] + j + v * L, part);
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      const Vec<T> factor = set1(c[i][r]);
      FW_UNROLL
      for (int v = 0; v < NV; ++v) sum[i][v] = fma(factor, u[v], sum[i][v]);
    }
  }
  // All loads come before the first store: rows at a distance of 4 KiB look alike to what orders them.
  FW_UNROLL
  for (int i = 0; i < MR; ++i) {
    FW_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t at = j + v * L;
      if (dropout.on) sum[i][v] *= keep<T>(dropout, keys[i], at);
      sum[i][v] += load_as(out[i] + at, part);
    }
  }
  FW_UNROLL
  for (int i = 0; i < MR; ++i) {
    FW_UNROLL
    for (int v = 0; v < NV; ++v) store_as(out[i] + j + v * L, sum[i][v], part);
  }
}

// Columns [begin, end) of out, rows in fours, all vectors of a row before the next row: they lie side by side.
template <typename S, typename T>
static void expand_strip(T* const* c, const T* const* up, int64_t rows, int64_t ranks, int64_t begin, int64_t end,
                         const Dropout& dropout, const uint64_t* keys, S* const* out) {
  constexpr int L = kLanes<T>, NV = kTileVectors;
  const auto add_rows = [&]<int MR>(Int<MR>, int64_t i) {
    int64_t j = begin;
    for (; j + NV * L <= end; j += NV * L) {
      // Rows of out lie apart: no hardware fetches the next ones ahead.
      for (int64_t next = i + MR; next < i + 2 * MR && next < rows; ++next) {
        for (int v = 0; v < NV; ++v) __builtin_prefetch(out[next] + j + v * L, 1);
      }
      add<S, MR, NV>(c + i, up, ranks, j, Whole{}, dropout, keys + i, out + i);
    }
    for (; j + L <= end; j += L) add<S, MR, 1>(c + i, up, ranks, j, Whole{}, dropout, keys + i, out + i);
    if (j < end) add<S, MR, 1>(c + i, up, ranks, j, end - j, dropout, keys + i, out + i);
  };
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) add_rows(Int<kRows>{}, i);
  for (; i < rows; ++i) add_rows(Int<1>{}, i);
}

template <typename S, typename T>
static void expand(T* const* c, const T* const* up, int64_t rows, int64_t ranks, int64_t columns,
                   const Dropout& dropout, const uint64_t* keys, S* const* out) {
  constexpr int64_t unit = kLanes<T> * kTileVectors;
  // What all rows meet stays in the first-level cache.
  const int64_t fitting = kStripBytes / int64_t(sizeof(T)) / (ranks ? ranks : 1) / unit * unit;
  const int64_t width = fitting > unit ? fitting : unit;
  for (int64_t j = 0; j < columns; j += width)
    expand_strip<S>(c, up, rows, ranks, j, columns - j < width ? columns : j + width, dropout, keys, out);
}

template <typename F>
FW_INLINE void for_parts(const UpdateArgs& a, const Block& b, const F& f) {
  for (int64_t i = 0; i < a.parts_of_block; ++i) {
    if (a.parts[b.part + i].ranks > 0) f(a.parts[b.part + i]);
  }
}

template <typename S>
static void update_block(const UpdateArgs& a, const Block& b) {
  using T = Compute<S>;
  const S* in[kManyRows];
  S* out[kManyRows];
  T* c[kManyRows];
  uint64_t keys[kManyRows] = {};
  const Dropout& dropout = a.in_dropout.on ? a.in_dropout : a.out_dropout;
  for (int64_t i = 0; i < b.count; ++i) {
    const int64_t m = row_number(a.order, b.first + i);
    in[i] = row_of<const S>(a.in, m), out[i] = row_of<S>(a.out, m), c[i] = row_of<T>(a.c, m);
    if (dropout.on) keys[i] = row_key(dropout, m);
  }
  const T* const* down = reinterpret_cast<const T* const*>(a.down + b.rank);
  const T* const* up = reinterpret_cast<const T* const*>(a.up + b.rank);
  if (a.backward) {
    for_parts(a, b, [&](const Part& p) {
      const S* in_part[kManyRows];
      T* c_part[kManyRows];
      for (int64_t i = 0; i < b.count; ++i) in_part[i] = in[i] + p.begin, c_part[i] = c[i] + p.rank;
      shrink(in_part, down + p.rank, b.count, p.ranks, p.columns, a.in_dropout, keys, c_part);
    });
    if (a.out.data) expand(c, up, b.count, b.ranks, a.out.columns, a.out_dropout, keys, out);
  } else {
    shrink(in, down, b.count, b.ranks, a.in.columns, a.in_dropout, keys, c);
    for_parts(a, b, [&](const Part& p) {
      S* out_part[kManyRows];
      T* c_part[kManyRows];
      for (int64_t i = 0; i < b.count; ++i) out_part[i] = out[i] + p.begin, c_part[i] = c[i] + p.rank;
      expand(c_part, up + p.rank, b.count, p.ranks, p.columns, a.out_dropout, keys, out_part);
    });
  }
}

void update(const UpdateArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.element, [&]<typename S>(S) {
    for (int64_t task = begin; task < end; ++task) update_block<S>(a, a.blocks[task]);
  });
}

}  // namespace fastweights::lora::FW_LEVEL
