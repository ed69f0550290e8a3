// y = x W^T with x as it is. Within a group four sums run over the codes, one per byte of the words (inputs k with the
// same k mod 4), each in the order of k; scale and minimum come in once per group. The order is the same for one row
// and for many, so a row's result is the same bits for any number of rows, tile and thread count.
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

// sums[R][16] += one group of one strip times one panel of R rows.
template <Format F, typename T, int R>
static void group_tile(const T* codes, const Numbers<T>& p, int64_t quarter, const T* x, const T* x_sums, T* sums) {
  constexpr int L = kLanes<T>, C = kColumns<T>;
  for (int t = 0; t < 4; ++t) {
    Vec<T> acc[R][C] = {};
    for (int64_t j = 0; j < quarter; ++j, codes += kStrip, x += R) {
      Vec<T> c[C];
      FW_UNROLL
      for (int i = 0; i < C; ++i) c[i] = load(codes + i * L);
      FW_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec<T> xr = set1(x[r]);
        FW_UNROLL
        for (int i = 0; i < C; ++i) acc[r][i] = fma(xr, c[i], acc[r][i]);
      }
    }
    const Vec<T> unit = set1(T(code_unit<F>(t)));
    FW_UNROLL
    for (int i = 0; i < C; ++i) {
      const Vec<T> scale = load(p.scale + i * L) * unit;
      FW_UNROLL
      for (int r = 0; r < R; ++r) {
        T* s = sums + r * kStrip + i * L;
        store(s, fma(scale, acc[r][i], load(s)));
      }
    }
  }
  FW_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec<T> x_sum = set1(x_sums[r]);
    FW_UNROLL
    for (int i = 0; i < C; ++i) {
      T* s = sums + r * kStrip + i * L;
      store(s, fma(load(p.minimum + i * L), x_sum, load(s)));
    }
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

template <Format F, typename T, int R>
FW_INLINE void panel_rows(const MatmulArgs& a, const T* codes, const Numbers<T>& p, int64_t row, int64_t g,
                          int64_t rows, T* sums) {
  if constexpr (R > 0) {
    if (rows != R) return panel_rows<F, T, R - 1>(a, codes, p, row, g, rows, sums);
    const Weight& w = a.weight;
    const T* x = static_cast<const T*>(a.x.values) + panel_offset(a.M, w.groups, row, g, w.group);
    const T* x_sums = static_cast<const T*>(a.x.sums) + panel_offset(a.M, w.groups, row, g, 1);
    group_tile<F, T, R>(codes, p, w.group / 4, x, x_sums, sums);
  }
}

template <Format F, typename T>
static void run(const MatmulArgs& a, int64_t begin, int64_t end) {
  const Weight& w = a.weight;
  const bool row_form = a.M == 1 && sizeof(T) == 4;
  Scratch scratch(Scratch::take_bytes<T>(kRowBlock * kStrip) + Scratch::take_bytes<T>(row_form ? 0 : w.group * kStrip));
  T* sums = scratch.take<T>(kRowBlock * kStrip);
  T* codes = scratch.take<T>(row_form ? 0 : w.group * kStrip);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / w.strips * kRowBlock, strip = task % w.strips;
    const int64_t rows = a.M - row < kRowBlock ? a.M - row : kRowBlock;
    for (int64_t i = 0; i < rows * kStrip; ++i) sums[i] = 0;
    const uint8_t* lines = w.packed + strip * w.strip_bytes;
    for (int64_t g = 0; g < w.groups; ++g, lines += w.group_bytes) {
      const uint8_t* parameters = lines + w.group_bytes - kLine;
      if constexpr (sizeof(T) == 4) {
        if (row_form) {
          group_row<F>(lines, load_parameters(parameters), w.group / 4,
                       static_cast<const float*>(a.x.values) + g * w.group, static_cast<const float*>(a.x.sums)[g],
                       sums);
          continue;
        }
      }
      Numbers<T> p;
      numbers(parameters, &p);
      unpack_group<F, T>(lines, w.group, codes);
      for (int64_t m = 0; m < rows; m += kFloatRows) {
        const int64_t R = rows - m < kFloatRows ? rows - m : kFloatRows;
        panel_rows<F, T, int(kFloatRows)>(a, codes, p, row + m, g, R, sums + m * kStrip);
      }
    }
    finish_strip<T>(a, sums, row, rows, strip);
  }
}

void matmul_float(const MatmulArgs& a, int64_t begin, int64_t end) noexcept {
  const bool wide = a.element == Element::f64, int4 = a.weight.format == Format::int4;
  if (wide) return int4 ? run<Format::int4, double>(a, begin, end) : run<Format::int8, double>(a, begin, end);
  return int4 ? run<Format::int4, float>(a, begin, end) : run<Format::int8, float>(a, begin, end);
}

}  // namespace fastweights::quantization::FW_LEVEL
