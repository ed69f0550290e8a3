// y = x W^T with x quantized to int8 per 32 inputs. Sums inside a block are integers, hence exact; the floating-point
// sum over blocks runs in the order of k for every row alike. So a row's result is the same bits for any number of
// rows, tile and thread count.
#include "core/scratch.h"
#include "quantization/dot.h"
#include "quantization/epilogue.h"

namespace fastweights::quantization::FW_LEVEL {

// The words with codes 4q .. 4q + 3, as bytes. Unpacked: one line per q. Packed int4: two q share a line.
template <Format F, bool Packed>
FW_INLINE Words quartet(const uint8_t* lines, int64_t q, int part) {
  if constexpr (F == Format::int4 && Packed) {
    const Words w = load_words(lines + (q >> 1) * kLine, part);
    return shift_right(w, 4 * int(q & 1)) & 0x0f0f0f0f;
  } else {
    return load_words(lines + q * kLine, part);
  }
}

// Strips that many rows meet at once: as many as fill the registers with accumulators.
#if defined(__AVX512F__) || defined(FW_WIDE)
constexpr int kStripsAtOnce = 4;
#else
constexpr int kStripsAtOnce = 1;
#endif

// One group of S strips: the lines of strip s at lines + s * stride, its sums [rows][16] at sums + s * kRowBlock * 16.
struct Group {
  const uint8_t* lines;
  int64_t stride, blocks;
  const Parameters* parameters;
  float* sums;
};

// sums += the group times one panel of R rows.
template <Format F, bool Packed, int R, int S>
static __attribute__((noinline)) void group_tile(const Group& group, const int8_t* codes, const float* scales,
                                                 const int32_t* code_sums, const float* group_sums, int64_t row) {
  using D = Dot<F>;
  constexpr int V = S * kParts;
  constexpr int64_t line_inputs = F == Format::int4 && Packed ? 8 : 4;
  const uint8_t* lines = group.lines;
  Vec<float> part[R][V] = {};
  for (int64_t b = 0; b < group.blocks; ++b) {
    Words acc[R][V];
    FW_UNROLL
    for (int r = 0; r < R; ++r) {
      FW_UNROLL
      for (int i = 0; i < V; ++i) acc[r][i] = D::start(code_sums[b * R + r]);
    }
    // Two quartets at a time, a line of nibbles; unrolled further, the loads are hoisted and the accumulators spill.
#pragma GCC unroll 1
    for (int q2 = 0; q2 < kBlock / 4; q2 += 2) {
      FW_UNROLL
      for (int q = q2; q < q2 + 2; ++q) {
        Words w[V];
        FW_UNROLL
        for (int i = 0; i < V; ++i) w[i] = quartet<F, Packed>(lines + i / kParts * group.stride, q, i % kParts);
        FW_UNROLL
        for (int r = 0; r < R; ++r) {
          int32_t four;
          __builtin_memcpy(&four, codes + (q * R + r) * 4, 4);
          const Words x = set1(four);
          FW_UNROLL
          for (int i = 0; i < V; ++i) {
            acc[r][i] = D::dot(acc[r][i], w[i], x);
            keep_in_register(acc[r][i]);
          }
        }
      }
    }
    FW_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<float> scale = set1(scales[b * R + r]);
      FW_UNROLL
      for (int i = 0; i < V; ++i) {
        part[r][i] = fma(__builtin_convertvector(D::finish(acc[r][i]), Vec<float>), scale, part[r][i]);
      }
    }
    lines += kBlock / line_inputs * kLine;
    codes += kBlock * R;
    if constexpr (Packed) {
      FW_UNROLL
      for (int64_t i = 0; i < kBlock / line_inputs; ++i) prefetch(lines + kAhead + i * kLine);
    }
  }
  FW_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec<float> x_sum = set1(group_sums[r]);
    FW_UNROLL
    for (int i = 0; i < V; ++i) {
      const Parameters& p = group.parameters[i / kParts];
      float* s = group.sums + (i / kParts * kRowBlock + row + r) * kStrip + i % kParts * kWords;
      store(s, fma(p.minimum[i % kParts], x_sum, fma(p.scale[i % kParts], part[r][i], load(s))));
    }
  }
}

// The codes of a group as bytes; the group behind it is on its way while many rows meet this one.
template <Format F>
static void unpack_group(const Weight& w, const uint8_t* lines, uint8_t* out) {
  for (int64_t q = 0; q < w.group / 4; q += 2) {
    prefetch(lines + w.group_bytes + q / 2 * kLine);
    FW_UNROLL
    for (int i = 0; i < kParts; ++i) {
      store(reinterpret_cast<int32_t*>(out + q * kLine) + i * kWords, quartet<F, true>(lines, q, i));
      store(reinterpret_cast<int32_t*>(out + (q + 1) * kLine) + i * kWords, quartet<F, true>(lines, q + 1, i));
    }
  }
}

// Rows [row, row + rows) of x, a panel, of which `local` is the first one's number in its block of rows.
template <Format F, bool Packed, int S, int R>
FW_INLINE void panel_rows(const MatmulArgs& a, const Group& group, int64_t row, int64_t local, int64_t g,
                          int64_t rows) {
  if constexpr (R > 0) {
    if (rows != R) return panel_rows<F, Packed, S, R - 1>(a, group, row, local, g, rows);
    const Weight& w = a.weight;
    const int64_t block = panel_offset(a.M, w.groups, row, g, group.blocks);
    group_tile<F, Packed, R, S>(group, a.x.codes + panel_offset(a.M, w.groups, row, g, w.group), a.x.scales + block,
                                a.x.code_sums + block,
                                static_cast<const float*>(a.x.sums) + panel_offset(a.M, w.groups, row, g, 1), local);
  }
}

// S strips from `strip` on times the rows [row, row + rows).
template <Format F, int S>
static void run_strips(const MatmulArgs& a, int64_t row, int64_t rows, int64_t strip, float* sums, uint8_t* bytes) {
  const Weight& w = a.weight;
  const bool unpack = F == Format::int4 && a.M > kIntRows;
  const int64_t unpacked = w.group * kStrip;
  Parameters parameters[S];
  for (int s = 0; s < S; ++s) {
    for (int64_t i = 0; i < rows * kStrip; ++i) sums[s * kRowBlock * kStrip + i] = 0.0f;
  }
  const uint8_t* lines = w.packed + strip * w.strip_bytes;
  for (int64_t g = 0; g < w.groups; ++g, lines += w.group_bytes) {
    for (int s = 0; s < S; ++s) {
      const uint8_t* of_strip = lines + s * w.strip_bytes;
      parameters[s] = load_parameters(of_strip + w.group_bytes - kLine);
      if (unpack) unpack_group<F>(w, of_strip, bytes + s * unpacked);
    }
    const Group group{unpack ? bytes : lines, unpack ? unpacked : w.strip_bytes, w.group / kBlock, parameters, sums};
    for (int64_t m = 0; m < rows; m += kIntRows) {
      const int64_t R = rows - m < kIntRows ? rows - m : kIntRows;
      if (unpack) {
        panel_rows<F, false, S, kIntRows>(a, group, row + m, m, g, R);
      } else {
        panel_rows<F, true, S, kIntRows>(a, group, row + m, m, g, R);
      }
    }
  }
  for (int s = 0; s < S; ++s) finish_strip<float>(a, sums + s * kRowBlock * kStrip, row, rows, strip + s);
}

template <Format F>
static void run(const MatmulArgs& a, int64_t begin, int64_t end) {
  constexpr int S = kStripsAtOnce;
  const Weight& w = a.weight;
  Scratch scratch(Scratch::take_bytes<float>(S * kRowBlock * kStrip) +
                  Scratch::take_bytes<uint8_t>(S * w.group * kStrip));
  float* sums = scratch.take<float>(S * kRowBlock * kStrip);
  uint8_t* bytes = scratch.take<uint8_t>(S * w.group * kStrip);
  for (int64_t task = begin; task < end;) {
    const int64_t row = task / w.strips * kRowBlock, strip = task % w.strips;
    const int64_t rows = a.M - row < kRowBlock ? a.M - row : kRowBlock;
    // A few rows read the weight as fast as memory gives it, one stream at a time.
    if (rows > kIntRows && end - task >= S && w.strips - strip >= S) {
      run_strips<F, S>(a, row, rows, strip, sums, bytes);
      task += S;
    } else {
      run_strips<F, 1>(a, row, rows, strip, sums, bytes);
      task += 1;
    }
  }
}

void matmul_int8(const MatmulArgs& a, int64_t begin, int64_t end) noexcept {
  a.weight.format == Format::int4 ? run<Format::int4>(a, begin, end) : run<Format::int8>(a, begin, end);
}

}  // namespace fastweights::quantization::FW_LEVEL
