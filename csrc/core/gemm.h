// Register-tiled products of small matrices held in cache. No packing, no blocking for caches: callers hand over
// blocks of at most a few hundred rows and columns, packed so that rows of B and C are multiples of the lane count.
#pragma once

#include "core/vec.h"

namespace fastweights::FW_LEVEL {

// Accumulators fill the registers that loads and broadcasts leave free: 24 of 32 on AVX-512 and NEON, 12 of 16 on AVX2.
#if defined(__AVX512F__) || defined(FW_WIDE) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

template <typename T, int MR, int NV>
FW_INLINE void gemm_tile(int64_t K, const T* A, int64_t am, int64_t ak, const T* B, int64_t ldb, T* C, int64_t ldc,
                         bool accumulate) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[MR][NV];
  FW_UNROLL
  for (int i = 0; i < MR; ++i) {
    FW_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = accumulate ? load(C + i * ldc + j * L) : zero<T>();
  }
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> b[NV];
    FW_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = load(B + k * ldb + j * L);
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      const Vec<T> a = set1(A[i * am + k * ak]);
      FW_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  }
  FW_UNROLL
  for (int i = 0; i < MR; ++i) {
    FW_UNROLL
    for (int j = 0; j < NV; ++j) store(C + i * ldc + j * L, acc[i][j]);
  }
}

template <int N>
struct Int {};

template <int MR, typename F>
FW_INLINE void with_rows(int64_t rows, const F& f) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      f(Int<MR>{});
    } else {
      with_rows<MR - 1>(rows, f);
    }
  }
}

// f(Int<rows>{}, first row) over panels of at most kTileRows rows; what is left goes in halves, since a panel of one
// or two rows has too few sums in flight.
template <typename F>
FW_INLINE void for_panels(int64_t M, const F& f) {
  constexpr int MR = kTileRows;
  int64_t m = 0;
  for (; M - m >= 2 * MR || M - m == MR; m += MR) f(Int<MR>{}, m);
  while (m < M) {
    const int64_t rest = M - m, rows = rest > MR ? (rest + 1) / 2 : rest;
    with_rows<MR>(rows, [&](auto n) { f(n, m); });
    m += rows;
  }
}

// f(Int<vectors>{}, first column) over N columns, a multiple of the lane count.
template <typename T, typename F>
FW_INLINE void for_strips(int64_t N, const F& f) {
  constexpr int L = kLanes<T>, NV = kTileVectors;
  int64_t n = 0;
  for (; n + NV * L <= N; n += NV * L) f(Int<NV>{}, n);
  if constexpr (NV > 2) {
    for (; n + 2 * L <= N; n += 2 * L) f(Int<2>{}, n);
  }
  for (; n < N; n += L) f(Int<1>{}, n);
}

template <typename T, int NV>
static __attribute__((noinline)) void gemm_strip(int64_t M, int64_t K, const T* A, int64_t am, int64_t ak, const T* B,
                                                 int64_t ldb, T* C, int64_t ldc, bool accumulate) {
  for_panels(M, [&]<int MR>(Int<MR>, int64_t m) {
    gemm_tile<T, MR, NV>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, accumulate);
  });
}

// C[m, n] = (accumulate ? C[m, n] : 0) + sum_k A[m * am + k * ak] * B[k * ldb + n]; the sum runs in the order of k.
// N is a multiple of the lane count. A row-major (am = lda, ak = 1) and A transposed (am = 1, ak = lda) are equally
// fast. All rows of a strip of columns in turn: the strip of B stays in the first-level cache, which all of B exceeds.
template <typename T>
FW_INLINE void gemm(int64_t M, int64_t N, int64_t K, const T* A, int64_t am, int64_t ak, const T* B, int64_t ldb, T* C,
                    int64_t ldc, bool accumulate) {
  for_strips<T>(
      N, [&]<int NV>(Int<NV>, int64_t n) { gemm_strip<T, NV>(M, K, A, am, ak, B + n, ldb, C + n, ldc, accumulate); });
}

template <int MR, int NV>
FW_INLINE void gemm_bf16_tile(int64_t K2, const uint32_t* A, int64_t am, const uint32_t* B, int64_t ldb, float* C,
                              int64_t ldc, bool accumulate) {
  constexpr int L = kLanes<float>;
  Vec<float> acc[MR][NV];
  FW_UNROLL
  for (int i = 0; i < MR; ++i) {
    FW_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = accumulate ? load(C + i * ldc + j * L) : zero<float>();
  }
  for (int64_t k = 0; k < K2; ++k) {
    Vec<uint32_t> b[NV];
    FW_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = load(B + k * ldb + j * L);
    FW_UNROLL
    for (int i = 0; i < MR; ++i) {
      const Vec<uint32_t> a = set1(A[i * am + k]);
      FW_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = dot2_bf16(acc[i][j], a, b[j]);
    }
  }
  FW_UNROLL
  for (int i = 0; i < MR; ++i) {
    FW_UNROLL
    for (int j = 0; j < NV; ++j) store(C + i * ldc + j * L, acc[i][j]);
  }
}

// C[m, n] (+)= sum over pairs of bfloat16: A holds K2 pairs per row (am apart, in pairs), B is [K2, ldb] with the two
// values of rows 2k and 2k + 1 side by side in 32 bits. Products and sums are float. N is a multiple of the lane count.
FW_INLINE void gemm_bf16(int64_t M, int64_t N, int64_t K2, const uint32_t* A, int64_t am, const uint32_t* B,
                         int64_t ldb, float* C, int64_t ldc, bool accumulate) {
  constexpr int L = kLanes<float>, MR = kTileRows, NV = kTileVectors;
  for (int64_t m = 0; m < M;) {
    const bool full = m + MR <= M;
    int64_t n = 0;
    for (; full && n + NV * L <= N; n += NV * L)
      gemm_bf16_tile<MR, NV>(K2, A + m * am, am, B + n, ldb, C + m * ldc + n, ldc, accumulate);
    for (; n < N; n += L) {
      if (full) {
        gemm_bf16_tile<MR, 1>(K2, A + m * am, am, B + n, ldb, C + m * ldc + n, ldc, accumulate);
      } else {
        gemm_bf16_tile<1, 1>(K2, A + m * am, am, B + n, ldb, C + m * ldc + n, ldc, accumulate);
      }
    }
    m += full ? MR : 1;
  }
}

}  // namespace fastweights::FW_LEVEL
