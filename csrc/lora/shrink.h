// The first product of an update, c = in downᵀ, of a block of rows.
#pragma once

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

}  // namespace fastweights::lora::FW_LEVEL
