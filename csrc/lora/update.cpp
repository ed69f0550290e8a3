// The update of a block of rows: both products while its rows are in the cache, c between them.
#include "core/gemm.h"
#include "core/scratch.h"
#include "lora/rows.h"

namespace fastweights::lora::FW_LEVEL {

constexpr int kRows = 4, kRanks = kTileVectors > 2 ? 4 : 2;

// Columns that are packed at a time: those of all rows of a block stay in the first-level cache while the rows of down
// pass, which they would not where they lie, at a distance of a power of two.
constexpr int64_t kColumns = 256;

// sums[i, r] += in[i] * down[r], lane by lane. A sum takes its vectors in the order of the columns, whatever the tile.
template <int MR, int NR, typename T>
static __attribute__((noinline)) void multiply(const T* in, const T* const* down, int64_t begin, int64_t end,
                                               Vec<T>* sums, int64_t ranks) {
  Vec<T> sum[MR][NR];
  FW_UNROLL
  for (int i = 0; i < MR; ++i) {
    FW_UNROLL
    for (int r = 0; r < NR; ++r) sum[i][r] = begin ? sums[i * ranks + r] : zero<T>();
  }
  for_vectors<T>(end - begin, [&](int64_t j, auto part) {
    Vec<T> d[NR];
    FW_UNROLL
    for (int r = 0; r < NR; ++r) d[r] = load_as(down[r] + begin + j, part);
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      const Vec<T> x = load(in + i * kColumns + j);
      FW_UNROLL
      for (int r = 0; r < NR; ++r) sum[i][r] = fma(x, d[r], sum[i][r]);
    }
  });
  FW_UNROLL
  for (int i = 0; i < MR; ++i) {
    FW_UNROLL
    for (int r = 0; r < NR; ++r) sums[i * ranks + r] = sum[i][r];
  }
}

template <int NR, typename T>
static void multiply_rows(const T* in, const T* const* down, int64_t rows, int64_t begin, int64_t end, Vec<T>* sums,
                          int64_t ranks) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    multiply<kRows, NR>(in + i * kColumns, down, begin, end, sums + i * ranks, ranks);
  for (; i < rows; ++i) multiply<1, NR>(in + i * kColumns, down, begin, end, sums + i * ranks, ranks);
}

// out = in in the type of the arithmetic, what is dropped left out, filled up with zeros to a whole vector.
template <typename S, typename T>
static void pack(const S* in, int64_t begin, int64_t end, const Dropout& dropout, uint64_t key, T* out) {
  for_vectors<T>(end - begin, [&](int64_t j, auto part) {
    Vec<T> v = load_as(in + begin + j, part);
    if (dropout.on) v *= keep<T>(dropout, key, begin + j);
    store(out + j, v);
  });
}

// c[i, r] = in[i] . down[r]
template <typename S, typename T>
static void shrink(const S* const* in, const T* const* down, int64_t rows, int64_t ranks, int64_t columns,
                   const Dropout& dropout, const uint64_t* keys, T* const* c) {
  Scratch scratch(Scratch::take_bytes<T>(rows * kColumns) + Scratch::take_bytes<Vec<T>>(rows * ranks));
  T* packed = scratch.take<T>(rows * kColumns);
  Vec<T>* sums = scratch.take<Vec<T>>(rows * ranks);
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    const int64_t end = columns - begin < kColumns ? columns : begin + kColumns;
    for (int64_t i = 0; i < rows; ++i) pack(in[i], begin, end, dropout, keys[i], packed + i * kColumns);
    int64_t r = 0;
    for (; r + kRanks <= ranks; r += kRanks) multiply_rows<kRanks>(packed, down + r, rows, begin, end, sums + r, ranks);
    for (; r < ranks; ++r) multiply_rows<1>(packed, down + r, rows, begin, end, sums + r, ranks);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t r = 0; r < ranks; ++r) c[i][r] = columns ? reduce_add<T>(sums[i * ranks + r]) : T(0);
  }
}

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

template <typename S, int NV, typename T, typename Part>
static void expand_strip(T* const* c, const T* const* up, int64_t rows, int64_t ranks, int64_t j, Part part,
                         const Dropout& dropout, const uint64_t* keys, S* const* out) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    // Rows of out lie apart: no hardware fetches the next ones ahead.
    for (int64_t next = i + kRows; next < i + 2 * kRows && next < rows; ++next) {
      for (int v = 0; v < NV; ++v) __builtin_prefetch(out[next] + j + v * kLanes<T>, 1);
    }
    add<S, kRows, NV>(c + i, up, ranks, j, part, dropout, keys + i, out + i);
  }
  for (; i < rows; ++i) add<S, 1, NV>(c + i, up, ranks, j, part, dropout, keys + i, out + i);
}

template <typename S, typename T>
static void expand(T* const* c, const T* const* up, int64_t rows, int64_t ranks, int64_t columns,
                   const Dropout& dropout, const uint64_t* keys, S* const* out) {
  constexpr int L = kLanes<T>, NV = kTileVectors;
  int64_t j = 0;
  for (; j + NV * L <= columns; j += NV * L) expand_strip<S, NV>(c, up, rows, ranks, j, Whole{}, dropout, keys, out);
  for (; j + L <= columns; j += L) expand_strip<S, 1>(c, up, rows, ranks, j, Whole{}, dropout, keys, out);
  if (j < columns) expand_strip<S, 1>(c, up, rows, ranks, j, columns - j, dropout, keys, out);
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
