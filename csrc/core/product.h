// The products of a chunk of a recurrence as register tiles. gemm.h has the plain product; here a tile goes on to a
// second product, stops at the diagonal or scales its rows, before its one store.
#pragma once

#include "core/gemm.h"
#include "core/vec.h"

namespace fastweights::FW_LEVEL {

// Element (i, j) at data[i * row + j * column]: a matrix that is broadcast element by element, so that it may as well
// be the transpose of what lies in memory.
template <typename T>
struct Left {
  const T* data;
  int64_t row, column;

  const T* at(int64_t i) const { return data + i * row; }
};

// Rows of whole vectors.
template <typename T>
struct Right {
  const T* data;
  int64_t ld;
};

enum class Triangle { lower, upper };
enum class By { rows, columns };

// Called once per panel of rows, for what may go on beside the arithmetic.
struct Nothing {
  void operator()() const {}
};

#define FW_METHOD __attribute__((always_inline)) inline

// MR rows of NV vectors in registers.
template <typename T, int MR, int NV>
struct Tile {
  static constexpr int L = kLanes<T>;
  Vec<T> sum[MR][NV];

  FW_METHOD void clear() {
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      FW_UNROLL
      for (int j = 0; j < NV; ++j) sum[i][j] = zero<T>();
    }
  }

  FW_METHOD void load_rows_scaled(const T* in, int64_t ld, const T* factor, int64_t step) {
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      FW_UNROLL
      for (int j = 0; j < NV; ++j) sum[i][j] = load(in + i * ld + j * L) * set1(factor[i * step]);
    }
  }

  FW_METHOD void load_columns_scaled(const T* in, int64_t ld, const T* factor) {
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      FW_UNROLL
      for (int j = 0; j < NV; ++j) sum[i][j] = load(in + i * ld + j * L) * load(factor + j * L);
    }
  }

  FW_METHOD void scale_rows(const T* factor) {
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      FW_UNROLL
      for (int j = 0; j < NV; ++j) sum[i][j] *= set1(factor[i]);
    }
  }

  FW_METHOD void scale(const T* factor, int64_t ld) {
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      FW_UNROLL
      for (int j = 0; j < NV; ++j) sum[i][j] *= load(factor + i * ld + j * L);
    }
  }

  // sum += left[0:MR, 0:n] * right[0:n]
  FW_METHOD void multiply(int64_t n, const T* left, int64_t row, int64_t column, const T* right, int64_t ld) {
    for (int64_t k = 0; k < n; ++k) step<0, MR>(left + k * column, row, right + k * ld);
  }

  // sum[i] += left[i, k] * right[k] for k <= i (upper: k >= i) below MR. The other side of the diagonal is not read,
  // so that not even a NaN passes from a later token to an earlier one.
  template <Triangle triangle, int K = 0>
  FW_METHOD void multiply_corner(const T* left, int64_t row, int64_t column, const T* right, int64_t ld) {
    if constexpr (K < MR) {
      if constexpr (triangle == Triangle::lower) {
        step<K, MR>(left + K * column, row, right + K * ld);
      } else {
        step<0, K + 1>(left + K * column, row, right + K * ld);
      }
      multiply_corner<triangle, K + 1>(left, row, column, right, ld);
    }
  }

  // sum[i] += left[i, k] * sum[k] for k < i (upper: k > i), each sum finished before it is used.
  template <Triangle triangle, int K = 0>
  FW_METHOD void substitute(const T* left, int64_t row, int64_t column) {
    if constexpr (K < MR) {
      constexpr int from = triangle == Triangle::lower ? K : MR - 1 - K;
      constexpr int first = triangle == Triangle::lower ? from + 1 : 0, last = triangle == Triangle::lower ? MR : from;
      FW_UNROLL
      for (int i = first; i < last; ++i) {
        const Vec<T> a = set1(left[i * row + from * column]);
        FW_UNROLL
        for (int j = 0; j < NV; ++j) sum[i][j] = fma(a, sum[from][j], sum[i][j]);
      }
      substitute<triangle, K + 1>(left, row, column);
    }
  }

  FW_METHOD void load_rows(const T* in, int64_t ld) {
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      FW_UNROLL
      for (int j = 0; j < NV; ++j) sum[i][j] = load(in + i * ld + j * L);
    }
  }

  FW_METHOD void store_to(T* out, int64_t ld) const {
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      FW_UNROLL
      for (int j = 0; j < NV; ++j) store(out + i * ld + j * L, sum[i][j]);
    }
  }

 private:
  // One column of the left times one row of the right, for the rows [First, Last).
  template <int First, int Last>
  FW_METHOD void step(const T* left, int64_t row, const T* right) {
    Vec<T> b[NV];
    FW_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = load(right + j * L);
    FW_UNROLL
    for (int i = First; i < Last; ++i) {
      const Vec<T> a = set1(left[i * row]);
      FW_UNROLL
      for (int j = 0; j < NV; ++j) sum[i][j] = fma(a, b[j], sum[i][j]);
    }
  }
};

// out[i] = scale[i] * (a1 b1)[i] + sum over j <= i (upper: j >= i, below M) of a2[i, j] b2[j], for M rows and the NV
// vectors of columns at b1, b2 and out; scale null: 1. All rows of a strip of columns in turn: it stays in the
// first-level cache, which a whole state of 128 x 128 exceeds.
template <typename T, Triangle triangle, int NV, typename Beside>
static __attribute__((noinline)) void read_out_strip(int64_t M, int64_t K, Left<T> a1, Right<T> b1, const T* scale,
                                                     Left<T> a2, Right<T> b2, T* out, int64_t ld, Beside& beside) {
  for_panels(M, [&]<int MR>(Int<MR>, int64_t i0) {
    beside();
    const T *corner = a2.at(i0) + i0 * a2.column, *rest = corner + MR * a2.column;
    Tile<T, MR, NV> tile;
    tile.clear();
    tile.multiply(K, a1.at(i0), a1.row, a1.column, b1.data, b1.ld);
    if (scale) tile.scale_rows(scale + i0);
    if constexpr (triangle == Triangle::lower) {
      tile.multiply(i0, a2.at(i0), a2.row, a2.column, b2.data, b2.ld);
      tile.template multiply_corner<triangle>(corner, a2.row, a2.column, b2.data + i0 * b2.ld, b2.ld);
    } else {
      tile.template multiply_corner<triangle>(corner, a2.row, a2.column, b2.data + i0 * b2.ld, b2.ld);
      tile.multiply(M - i0 - MR, rest, a2.row, a2.column, b2.data + (i0 + MR) * b2.ld, b2.ld);
    }
    tile.store_to(out + i0 * ld, ld);
  });
}

template <typename T, Triangle triangle = Triangle::lower, typename Beside = Nothing>
FW_INLINE void read_out(int64_t M, int64_t N, int64_t K, Left<T> a1, Right<T> b1, const T* scale, Left<T> a2,
                        Right<T> b2, T* out, int64_t ld, Beside&& beside = {}) {
  for_strips<T>(N, [&]<int NV>(Int<NV>, int64_t n) {
    read_out_strip<T, triangle, NV>(M, K, a1, {b1.data + n, b1.ld}, scale, a2, {b2.data + n, b2.ld}, out + n, ld,
                                    beside);
  });
}

// X <- X + a1 b1 + strict(a2) X, where the strict triangle makes it a substitution: X[i] = X[i] + (a1 b1)[i] +
// sum over j < i (upper: j > i, below M) of a2[i, j] X[j], for M rows of N columns.
template <typename T, Triangle triangle, int NV, typename Beside>
static __attribute__((noinline)) void solve_strip(int64_t M, int64_t K, Left<T> a1, Right<T> b1, Left<T> a2, T* X,
                                                  int64_t ld, Beside& beside) {
  for_panels(M, [&]<int MR>(Int<MR>, int64_t from) {
    beside();
    const int64_t i0 = triangle == Triangle::lower ? from : M - from - MR;
    const T *corner = a2.at(i0) + i0 * a2.column, *rest = corner + MR * a2.column;
    Tile<T, MR, NV> tile;
    tile.load_rows(X + i0 * ld, ld);
    tile.multiply(K, a1.at(i0), a1.row, a1.column, b1.data, b1.ld);
    if constexpr (triangle == Triangle::lower) {
      tile.multiply(i0, a2.at(i0), a2.row, a2.column, X, ld);
    } else {
      tile.multiply(M - i0 - MR, rest, a2.row, a2.column, X + (i0 + MR) * ld, ld);
    }
    tile.template substitute<triangle>(corner, a2.row, a2.column);
    tile.store_to(X + i0 * ld, ld);
  });
}

template <typename T, Triangle triangle = Triangle::lower, typename Beside = Nothing>
FW_INLINE void solve(int64_t M, int64_t N, int64_t K, Left<T> a1, Right<T> b1, Left<T> a2, T* X, int64_t ld,
                     Beside&& beside = {}) {
  for_strips<T>(N, [&]<int NV>(Int<NV>, int64_t n) {
    solve_strip<T, triangle, NV>(M, K, a1, {b1.data + n, b1.ld}, a2, X + n, ld, beside);
  });
}

// out[i] += sum over j >= i below M of a[i, j] b[j].
template <typename T, int NV>
static __attribute__((noinline)) void add_upper_strip(int64_t M, Left<T> a, Right<T> b, T* out, int64_t ld) {
  for_panels(M, [&]<int MR>(Int<MR>, int64_t i0) {
    const T *corner = a.at(i0) + i0 * a.column, *rest = corner + MR * a.column;
    Tile<T, MR, NV> tile;
    tile.load_rows(out + i0 * ld, ld);
    tile.template multiply_corner<Triangle::upper>(corner, a.row, a.column, b.data + i0 * b.ld, b.ld);
    tile.multiply(M - i0 - MR, rest, a.row, a.column, b.data + (i0 + MR) * b.ld, b.ld);
    tile.store_to(out + i0 * ld, ld);
  });
}

template <typename T>
FW_INLINE void add_upper(int64_t M, int64_t N, Left<T> a, Right<T> b, T* out, int64_t ld) {
  for_strips<T>(N, [&]<int NV>(Int<NV>, int64_t n) { add_upper_strip<T, NV>(M, a, {b.data + n, b.ld}, out + n, ld); });
}

// out[i, c] = factor[i, c] * (left * right)[i, c], out and factor of the same layout.
template <typename T, int NV, typename Beside>
static __attribute__((noinline)) void scaled_product_strip(int64_t M, int64_t K, Left<T> a, Right<T> b, const T* factor,
                                                           T* out, int64_t ld, Beside& beside) {
  for_panels(M, [&]<int MR>(Int<MR>, int64_t i0) {
    beside();
    Tile<T, MR, NV> tile;
    tile.clear();
    tile.multiply(K, a.at(i0), a.row, a.column, b.data, b.ld);
    tile.scale(factor + i0 * ld, ld);
    tile.store_to(out + i0 * ld, ld);
  });
}

template <typename T, typename Beside>
FW_INLINE void scaled_product(int64_t M, int64_t N, int64_t K, Left<T> a, Right<T> b, const T* factor, T* out,
                              int64_t ld, Beside& beside) {
  for_strips<T>(N, [&]<int NV>(Int<NV>, int64_t n) {
    scaled_product_strip<T, NV>(M, K, a, {b.data + n, b.ld}, factor + n, out + n, ld, beside);
  });
}

// The lower triangle, and what else its tiles cover, of left * right.
template <typename T, int MR>
static __attribute__((noinline)) void triangle_rows(int64_t i0, int64_t K, Left<T> a, Right<T> b, T* out, int64_t ld) {
  const int64_t L = kLanes<T>, columns = (i0 + MR + L - 1) / L * L;
  for_strips<T>(columns, [&]<int NV>(Int<NV>, int64_t n) {
    Tile<T, MR, NV> tile;
    tile.clear();
    tile.multiply(K, a.at(i0), a.row, a.column, b.data + n, b.ld);
    tile.store_to(out + i0 * ld + n, ld);
  });
}

template <typename T>
FW_INLINE void triangle(int64_t M, int64_t K, Left<T> a, Right<T> b, T* out, int64_t ld) {
  for_panels(M, [&]<int MR>(Int<MR>, int64_t i0) { triangle_rows<T, MR>(i0, K, a, b, out, ld); });
}

// S[i, c] = decay * from[i, c] + (left * right)[i, c], S and from of the same layout, perhaps the same. The decay is
// decay[i * step], or decay[c] where it goes by columns.
template <typename T, By by, int MR>
static __attribute__((noinline)) void update_rows(int64_t i0, int64_t N, int64_t n, const T* decay, int64_t step,
                                                  Left<T> a, Right<T> b, const T* from, T* S, int64_t ld) {
  for_strips<T>(N, [&]<int NV>(Int<NV>, int64_t c) {
    Tile<T, MR, NV> tile;
    if constexpr (by == By::rows) {
      tile.load_rows_scaled(from + i0 * ld + c, ld, decay + i0 * step, step);
    } else {
      tile.load_columns_scaled(from + i0 * ld + c, ld, decay + c);
    }
    tile.multiply(n, a.at(i0), a.row, a.column, b.data + c, b.ld);
    tile.store_to(S + i0 * ld + c, ld);
  });
}

template <typename T, By by = By::rows, typename Beside = Nothing>
FW_INLINE void update(int64_t M, int64_t N, int64_t n, const T* decay, int64_t step, Left<T> a, Right<T> b,
                      const T* from, T* S, int64_t ld, Beside&& beside = {}) {
  for_panels(M, [&]<int MR>(Int<MR>, int64_t i0) {
    beside();
    update_rows<T, by, MR>(i0, N, n, decay, step, a, b, from, S, ld);
  });
}

// ---- transposition: log2(lanes) rounds that exchange the off-diagonal blocks of half the size -------------------

template <int H, typename V, int... I>
FW_INLINE V keep_even_blocks(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & H) ? int(sizeof...(I)) + I - H : I)...);
}
template <int H, typename V, int... I>
FW_INLINE V keep_odd_blocks(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & H) ? int(sizeof...(I)) + I : I + H)...);
}

template <typename T, int H>
FW_INLINE void transpose_rounds(Vec<T> (&r)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  using All = typename LanesUpTo<L>::type;
  FW_UNROLL
  for (int i = 0; i < L; ++i) {
    if ((i & H) == 0) {
      const Vec<T> a = r[i], b = r[i + H];
      r[i] = keep_even_blocks<H>(a, b, All{});
      r[i + H] = keep_odd_blocks<H>(a, b, All{});
    }
  }
  if constexpr (H > 1) transpose_rounds<T, H / 2>(r);
}

template <typename T>
FW_INLINE void transpose(Vec<T> (&r)[kLanes<T>]) {
  transpose_rounds<T, kLanes<T> / 2>(r);
}

// out[j, i] = in[i, j]; rows and columns are multiples of the lane count.
template <typename T>
static void transpose(int64_t rows, int64_t columns, const T* in, int64_t ld_in, T* out, int64_t ld_out) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < rows; i += L) {
    for (int64_t j = 0; j < columns; j += L) {
      Vec<T> r[L];
      FW_UNROLL
      for (int n = 0; n < L; ++n) r[n] = load(in + (i + n) * ld_in + j);
      transpose<T>(r);
      FW_UNROLL
      for (int n = 0; n < L; ++n) store(out + (j + n) * ld_out + i, r[n]);
    }
  }
}

// The sums of the lanes of L vectors, as one vector.
template <typename T>
FW_INLINE Vec<T> reduce_each(const T* rows) {
  constexpr int L = kLanes<T>;
  Vec<T> r[L];
  FW_UNROLL
  for (int n = 0; n < L; ++n) r[n] = load(rows + n * L);
  transpose<T>(r);
  Vec<T> sum = r[0];
  FW_UNROLL
  for (int n = 1; n < L; ++n) sum += r[n];
  return sum;
}

}  // namespace fastweights::FW_LEVEL
