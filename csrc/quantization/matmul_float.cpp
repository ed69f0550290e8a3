// y = x W^T with x as it is. Within a group four sums run over the codes, one per byte of the words (inputs k with the
// same k mod 4), each in the order of k; scale and minimum come in once per group. The order is the same for one row
// and for many, so a row's result is the same bits for any number of rows, tile and thread count.
#include "core/gemm.h"
#include "core/scratch.h"
#include "quantization/epilogue.h"

namespace fastweights::quantization::FW_LEVEL {

template <typename T>
constexpr int kColumns = int(kStrip) / kLanes<T>;  // vectors of T per strip

// One group of a strip as numbers: out[t][j][16] holds the codes of inputs 4j + t, in units of code_unit(t).
template <Format F, typename T>
static void unpack_group(const uint8_t* lines, int64_t group, T* out) {
  const int64_t quarter = group / 4;
  for (int64_t j = 0; j < quarter; ++j) {
    for (int i = 0; i < kParts; ++i) {
      const Words line = load_words(lines + (F == Format::int4 ? j / 2 : j) * kLine, i);
      const Words w = F == Format::int4 && j % 2 ? shift_right(line, 4) : line;
      FW_UNROLL
      for (int t = 0; t < 4; ++t) {
        using Numbers = typename VecOf<T, kWords>::unaligned;
        T* to = out + (t * quarter + j) * kStrip + i * kWords;
        *reinterpret_cast<Numbers*>(to) = __builtin_convertvector(code_at<F>(w, t), typename VecOf<T, kWords>::type);
      }
    }
  }
}

template <typename T>
struct Numbers {
  T scale[kStrip], minimum[kStrip];
};

template <typename T>
static void numbers(const uint8_t* parameters, Numbers<T>* out) {
  const Parameters p = load_parameters(parameters);
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

// sums += one group of S strips times one panel of R rows; strip s has its codes at s * 16 * group and its sums
// [rows][16] at s * kRowBlock * 16.
template <Format F, typename T, int R, int S>
static __attribute__((noinline)) void group_tile(const T* codes, const Numbers<T>* p, int64_t quarter, const T* x,
                                                 const T* x_sums, T* sums) {
  constexpr int L = kLanes<T>, C = kColumns<T>, V = S * C;
  const int64_t strip = 4 * quarter * kStrip;
  const auto at = [&](int i, int r)
                      __attribute__((always_inline)) { return sums + (i / C * kRowBlock + r) * kStrip + i % C * L; };
#pragma GCC unroll 1
  for (int t = 0; t < 4; ++t) {
    Vec<T> acc[R][V] = {};
    for (int64_t j = 0; j < quarter; ++j, codes += kStrip, x += R) {
      Vec<T> c[V];
      FW_UNROLL
      for (int i = 0; i < V; ++i) c[i] = load(codes + i / C * strip + i % C * L);
      FW_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec<T> xr = set1(x[r]);
        FW_UNROLL
        for (int i = 0; i < V; ++i) acc[r][i] = fma(xr, c[i], acc[r][i]);
      }
    }
    const Vec<T> unit = set1(T(code_unit<F>(t)));
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
static void group_row(const uint8_t* lines, const Parameters& p, int64_t quarter, const float* x, float x_sum,
                      float* sums) {
  Vec<float> acc[kParts][4] = {};
  constexpr int step = F == Format::int4 ? 2 : 1;
  for (int64_t j = 0; j < quarter; j += step, lines += kLine) {
    Words w[kParts];
    FW_UNROLL
    for (int i = 0; i < kParts; ++i) w[i] = load_words(lines, i);
    prefetch(lines + kAhead);
    FW_UNROLL
    for (int half = 0; half < step; ++half) {
      FW_UNROLL
      for (int t = 0; t < 4; ++t) {
        const Vec<float> xt = set1(x[t * quarter + j + half]);
        FW_UNROLL
        for (int i = 0; i < kParts; ++i) {
          acc[i][t] = fma(xt, __builtin_convertvector(code_at<F>(w[i], t), Vec<float>), acc[i][t]);
          keep_in_register(acc[i][t]);
        }
      }
      FW_UNROLL
      for (int i = 0; i < kParts; ++i) w[i] = shift_right(w[i], 4);
    }
  }
  FW_UNROLL
  for (int i = 0; i < kParts; ++i) {
    Vec<float> y = load(sums + i * kWords);
    FW_UNROLL
    for (int t = 0; t < 4; ++t) y = fma(p.scale[i] * code_unit<F>(t), acc[i][t], y);
    store(sums + i * kWords, fma(p.minimum[i], set1(x_sum), y));
  }
}

template <Format F, typename T, int S, int R>
FW_INLINE void panel_rows(const MatmulArgs& a, const T* codes, const Numbers<T>* p, int64_t row, int64_t g,
                          int64_t rows, T* sums) {
  if constexpr (R > 0) {
    if (rows != R) return panel_rows<F, T, S, R - 1>(a, codes, p, row, g, rows, sums);
    const Weight& w = a.weight;
    const T* x = static_cast<const T*>(a.x.values) + panel_offset(a.M, w.groups, row, g, w.group);
    const T* x_sums = static_cast<const T*>(a.x.sums) + panel_offset(a.M, w.groups, row, g, 1);
    group_tile<F, T, R, S>(codes, p, w.group / 4, x, x_sums, sums);
  }
}

// S strips from `strip` on times the rows [row, row + rows).
template <Format F, typename T, int S>
static void run_strips(const MatmulArgs& a, int64_t row, int64_t rows, int64_t strip, T* sums, T* codes) {
  const Weight& w = a.weight;
  Numbers<T> p[S];
  const uint8_t* lines = w.packed + strip * w.strip_bytes;
  for (int64_t g = 0; g < w.groups; ++g, lines += w.group_bytes) {
    for (int s = 0; s < S; ++s) {
      const uint8_t* of_strip = lines + s * w.strip_bytes;
      numbers(of_strip + w.group_bytes - kLine, &p[s]);
      unpack_group<F, T>(of_strip, w.group, codes + s * w.group * kStrip);
    }
    for (int64_t m = 0; m < rows; m += kFloatRows) {
      const int64_t R = rows - m < kFloatRows ? rows - m : kFloatRows;
      panel_rows<F, T, S, int(kFloatRows)>(a, codes, p, row + m, g, R, sums + m * kStrip);
    }
  }
}

template <Format F>
static void run_row(const MatmulArgs& a, int64_t strip, float* sums) {
  const Weight& w = a.weight;
  const uint8_t* lines = w.packed + strip * w.strip_bytes;
  for (int64_t g = 0; g < w.groups; ++g, lines += w.group_bytes)
    group_row<F>(lines, load_parameters(lines + w.group_bytes - kLine), w.group / 4,
                 static_cast<const float*>(a.x.values) + g * w.group, static_cast<const float*>(a.x.sums)[g], sums);
}

template <Format F, typename T>
static void run(const MatmulArgs& a, int64_t begin, int64_t end) {
  constexpr int S = kStripsAtOnce<T>;
  const Weight& w = a.weight;
  const bool row_form = a.M == 1 && sizeof(T) == 4;
  Scratch scratch(Scratch::take_bytes<T>(S * kRowBlock * kStrip) + Scratch::take_bytes<T>(S * w.group * kStrip));
  T* sums = scratch.take<T>(S * kRowBlock * kStrip);
  T* codes = scratch.take<T>(S * w.group * kStrip);
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
      run_strips<F, T, S>(a, row, rows, strip, sums, codes);
    } else {
      run_strips<F, T, 1>(a, row, rows, strip, sums, codes);
    }
    for (int64_t s = 0; s < at_once; ++s) finish_strip<T>(a, sums + s * kRowBlock * kStrip, row, rows, strip + s);
    task += at_once;
  }
}

void matmul_float(const MatmulArgs& a, int64_t begin, int64_t end) noexcept {
  const bool wide = a.element == Element::f64, int4 = a.weight.format == Format::int4;
  if (wide) return int4 ? run<Format::int4, double>(a, begin, end) : run<Format::int8, double>(a, begin, end);
  return int4 ? run<Format::int4, float>(a, begin, end) : run<Format::int8, float>(a, begin, end);
}

}  // namespace fastweights::quantization::FW_LEVEL
