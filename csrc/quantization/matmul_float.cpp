// y = x W^T with x as it is. Within a group four sums run over the codes, one per byte of the words (inputs k with the
// same k mod 4), each in the order of k; scale and minimum come in once per group. The order is the same for one row
// and for many, so a row's result is the same bits for any number of rows, tile and thread count.
#include "core/gemm.h"
#include "core/scratch.h"
#include "quantization/epilogue.h"

namespace fastweights::quantization::FW_LEVEL {

template <typename T>
constexpr int kColumns = int(kStrip) / kLanes<T>;  // vectors of T per strip

// One group of a strip as numbers: out[t][j][16] holds the levels of inputs 4j + t, in units of level_unit(t).
template <Format F, typename T>
static void unpack_group(const uint8_t* run, int64_t group, T* out) {
  using Numbers = typename VecOf<T, kWords>::type;
  using Unaligned = typename VecOf<T, kWords>::unaligned;
  const int64_t quarter = group / 4;
  for (int64_t j = 0; j < quarter; j += kRun<F>, run += kRunBytes<F>) {
    for (int i = 0; i < kParts; ++i) {
      FW_UNROLL
      for (int u = 0; u < kRun<F>; ++u) {
        const Words w = code_words<F>(run, u, i);
        FW_UNROLL
        for (int t = 0; t < 4; ++t) {
          T* to = out + (t * quarter + j + u) * kStrip + i * kWords;
          *reinterpret_cast<Unaligned*>(to) = __builtin_convertvector(level_at<F>(w, t), Numbers);
        }
      }
    }
  }
}

template <typename T>
struct Numbers {
  T scale[kStrip], minimum[kStrip];
};

template <typename T>
static void numbers(const Parameters& p, Numbers<T>* out) {
  for (int i = 0; i < kParts; ++i) {
    for (int lane = 0; lane < kWords; ++lane) {
      out->scale[i * kWords + lane] = T(p.scale[i][lane]);
      out->minimum[i * kWords + lane] = T(p.minimum[i][lane]);
    }
  }
}

// Strips that many rows meet at once: as many as fill the registers with sums.
template <typename T>
constexpr int kStripsAtOnce = kTileVectors > kColumns<T> ? kTileVectors / kColumns<T> : 1;

// sums += one group of S strips times one panel of R rows; strip s has its levels at s * 16 * group, those of inputs
// 4j + t in units of units[t], and its sums [rows][16] at s * kRowBlock * 16.
template <typename T, int R, int S>
static __attribute__((noinline)) void group_tile(const T* levels, const float* units, const Numbers<T>* p,
                                                 int64_t quarter, const T* x, const T* x_sums, T* sums) {
  constexpr int L = kLanes<T>, C = kColumns<T>, V = S * C;
  const int64_t strip = 4 * quarter * kStrip;
  const auto at = [&](int i, int r)
                      __attribute__((always_inline)) { return sums + (i / C * kRowBlock + r) * kStrip + i % C * L; };
#pragma GCC unroll 1
  for (int t = 0; t < 4; ++t) {
    Vec<T> acc[R][V] = {};
    for (int64_t j = 0; j < quarter; ++j, levels += kStrip, x += R) {
      Vec<T> c[V];
      FW_UNROLL
      for (int i = 0; i < V; ++i) c[i] = load(levels + i / C * strip + i % C * L);
      FW_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec<T> xr = set1(x[r]);
        FW_UNROLL
        for (int i = 0; i < V; ++i) acc[r][i] = fma(xr, c[i], acc[r][i]);
      }
    }
    const Vec<T> unit = set1(T(units[t]));
    FW_UNROLL
    for (int i = 0; i < V; ++i) {
      const Vec<T> scale = load(p[i / C].scale + i % C * L) * unit;
      FW_UNROLL
      for (int r = 0; r < R; ++r) store(at(i, r), fma(scale, acc[r][i], load(at(i, r))));
    }
  }
  FW_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec<T> x_sum = set1(x_sums[r]);
    FW_UNROLL
    for (int i = 0; i < V; ++i) store(at(i, r), fma(load(p[i / C].minimum + i % C * L), x_sum, load(at(i, r))));
  }
}

// The same for one row, straight from the packed lines.
template <Format F>
static void group_row(const uint8_t* run, const Parameters& p, int64_t quarter, const float* x, float x_sum,
                      float* sums) {
  Vec<float> acc[kParts][4] = {};
  for (int64_t j = 0; j < quarter; j += kRun<F>, run += kRunBytes<F>) {
    FW_UNROLL
    for (int64_t i = 0; i < kRunBytes<F>; i += kLine) prefetch(run + kAhead + i);
    FW_UNROLL
    for (int u = 0; u < kRun<F>; ++u) {
      Words w[kParts];
      FW_UNROLL
      for (int i = 0; i < kParts; ++i) w[i] = code_words<F>(run, u, i);
      FW_UNROLL
      for (int t = 0; t < 4; ++t) {
        const Vec<float> xt = set1(x[t * quarter + j + u]);
        FW_UNROLL
        for (int i = 0; i < kParts; ++i) {
          acc[i][t] = fma(xt, level_at<F>(w[i], t), acc[i][t]);
          keep_in_register(acc[i][t]);
        }
      }
    }
  }
  FW_UNROLL
  for (int i = 0; i < kParts; ++i) {
    Vec<float> y = load(sums + i * kWords);
    FW_UNROLL
    for (int t = 0; t < 4; ++t) y = fma(p.scale[i] * level_unit<F>(t), acc[i][t], y);
    store(sums + i * kWords, fma(p.minimum[i], set1(x_sum), y));
  }
}

template <typename T, int S, int R>
FW_INLINE void panel_rows(const MatmulArgs& a, const T* levels, const float* units, const Numbers<T>* p, int64_t row,
                          int64_t g, int64_t rows, T* sums) {
  if constexpr (R > 0) {
    if (rows != R) return panel_rows<T, S, R - 1>(a, levels, units, p, row, g, rows, sums);
    const Weight& w = a.weight;
    const T* x = static_cast<const T*>(a.x.values) + panel_offset(a.M, w.groups, row, g, w.group);
    const T* x_sums = static_cast<const T*>(a.x.sums) + panel_offset(a.M, w.groups, row, g, 1);
    group_tile<T, R, S>(levels, units, p, w.group / 4, x, x_sums, sums);
  }
}

// S strips from `strip` on times the rows [row, row + rows).
template <Format F, typename T, int S>
static void run_strips(const MatmulArgs& a, int64_t row, int64_t rows, int64_t strip, T* sums, T* levels) {
  const Weight& w = a.weight;
  constexpr float units[4] = {level_unit<F>(0), level_unit<F>(1), level_unit<F>(2), level_unit<F>(3)};
  Numbers<T> p[S];
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int s = 0; s < S; ++s) {
      const uint8_t* of_strip = w.packed + (strip + s) * w.strip_bytes;
      numbers(load_parameters<F>(w, of_strip, g), &p[s]);
      unpack_group<F, T>(lines_of<F>(w, of_strip, g), w.group, levels + s * w.group * kStrip);
    }
    for (int64_t m = 0; m < rows; m += kFloatRows) {
      const int64_t R = rows - m < kFloatRows ? rows - m : kFloatRows;
      panel_rows<T, S, int(kFloatRows)>(a, levels, units, p, row + m, g, R, sums + m * kStrip);
    }
  }
}

template <Format F>
static void run_row(const MatmulArgs& a, int64_t strip, float* sums) {
  const Weight& w = a.weight;
  const uint8_t* of_strip = w.packed + strip * w.strip_bytes;
  for (int64_t g = 0; g < w.groups; ++g)
    group_row<F>(lines_of<F>(w, of_strip, g), load_parameters<F>(w, of_strip, g), w.group / 4,
                 static_cast<const float*>(a.x.values) + g * w.group, static_cast<const float*>(a.x.sums)[g], sums);
}

template <Format F, typename T>
static void run(const MatmulArgs& a, int64_t begin, int64_t end) {
  constexpr int S = kStripsAtOnce<T>;
  const Weight& w = a.weight;
  const bool row_form = a.M == 1 && sizeof(T) == 4;
  Scratch scratch(Scratch::take_bytes<T>(S * kRowBlock * kStrip) + Scratch::take_bytes<T>(S * w.group * kStrip));
  T* sums = scratch.take<T>(S * kRowBlock * kStrip);
  T* levels = scratch.take<T>(S * w.group * kStrip);
  for (int64_t task = begin; task < end;) {
    const int64_t row = task / w.strips * kRowBlock, strip = task % w.strips;
    const int64_t rows = a.M - row < kRowBlock ? a.M - row : kRowBlock;
    const int64_t at_once = !row_form && end - task >= S && w.strips - strip >= S ? S : 1;
    for (int64_t s = 0; s < at_once; ++s) {
      for (int64_t i = 0; i < rows * kStrip; ++i) sums[s * kRowBlock * kStrip + i] = 0;
    }
    if (row_form) {
      if constexpr (sizeof(T) == 4) run_row<F>(a, strip, sums);
    } else if (at_once == S) {
      run_strips<F, T, S>(a, row, rows, strip, sums, levels);
    } else {
      run_strips<F, T, 1>(a, row, rows, strip, sums, levels);
    }
    for (int64_t s = 0; s < at_once; ++s) finish_strip<T>(a, sums + s * kRowBlock * kStrip, row, rows, strip + s);
    task += at_once;
  }
}

void matmul_float(const MatmulArgs& a, int64_t begin, int64_t end) noexcept {
  with_format(a.weight.format, [&]<Format F>(FormatTag<F>) {
    a.element == Element::f64 ? run<F, double>(a, begin, end) : run<F, float>(a, begin, end);
  });
}

}  // namespace fastweights::quantization::FW_LEVEL
