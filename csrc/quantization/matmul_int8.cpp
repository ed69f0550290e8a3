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

// sums[R][16] += one group of one strip times one panel of R rows.
template <Format F, bool Packed, int R>
static __attribute__((noinline)) void group_tile(const uint8_t* lines, const Parameters& p, int64_t blocks,
                                                 const int8_t* codes, const float* scales, const int32_t* code_sums,
                                                 const float* group_sums, float* sums) {
  using D = Dot<F>;
  Vec<float> part[R][kParts] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    Words acc[R][kParts];
    FW_UNROLL
    for (int r = 0; r < R; ++r) {
      FW_UNROLL
      for (int i = 0; i < kParts; ++i) acc[r][i] = D::start(code_sums[b * R + r]);
    }
    // Two quartets at a time, a line of nibbles; unrolled further, the loads are hoisted and the accumulators spill.
#pragma GCC unroll 1
    for (int q2 = 0; q2 < kBlock / 4; q2 += 2) {
      FW_UNROLL
      for (int q = q2; q < q2 + 2; ++q) {
        Words w[kParts];
        FW_UNROLL
        for (int i = 0; i < kParts; ++i) w[i] = quartet<F, Packed>(lines, q, i);
        FW_UNROLL
        for (int r = 0; r < R; ++r) {
          int32_t four;
          __builtin_memcpy(&four, codes + (q * R + r) * 4, 4);
          const Words x = set1(four);
          FW_UNROLL
          for (int i = 0; i < kParts; ++i) {
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
      for (int i = 0; i < kParts; ++i) {
        part[r][i] = fma(__builtin_convertvector(D::finish(acc[r][i]), Vec<float>), scale, part[r][i]);
      }
    }
    const int64_t line_inputs = F == Format::int4 && Packed ? 8 : 4;
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
    for (int i = 0; i < kParts; ++i) {
      float* s = sums + r * kStrip + i * kWords;
      store(s, fma(p.minimum[i], x_sum, fma(p.scale[i], part[r][i], load(s))));
    }
  }
}

template <Format F>
static void unpack_group(const uint8_t* lines, int64_t group, uint8_t* out) {
  for (int64_t q = 0; q < group / 4; ++q) {
    for (int i = 0; i < kParts; ++i) {
      store(reinterpret_cast<int32_t*>(out + q * kLine) + i * kWords, quartet<F, true>(lines, q, i));
    }
  }
}

template <Format F, bool Packed, int R>
FW_INLINE void panel_rows(const MatmulArgs& a, const uint8_t* lines, const Parameters& p, int64_t row, int64_t g,
                          int64_t rows, float* sums) {
  if constexpr (R > 0) {
    if (rows != R) return panel_rows<F, Packed, R - 1>(a, lines, p, row, g, rows, sums);
    const Weight& w = a.weight;
    const int64_t Kp = w.groups * w.group, blocks = w.group / kBlock;
    const int64_t block = row * (Kp / kBlock) + g * blocks * R;
    group_tile<F, Packed, R>(lines, p, blocks, a.x.codes + row * Kp + g * w.group * R, a.x.scales + block,
                             a.x.code_sums + block, static_cast<const float*>(a.x.sums) + row * w.groups + g * R, sums);
  }
}

template <Format F>
static void run(const MatmulArgs& a, int64_t begin, int64_t end) {
  const Weight& w = a.weight;
  const bool unpack = F == Format::int4 && a.M > kIntRows;
  Scratch scratch(Scratch::take_bytes<float>(kRowBlock * kStrip) +
                  Scratch::take_bytes<uint8_t>(unpack ? w.group * kStrip : 0));
  float* sums = scratch.take<float>(kRowBlock * kStrip);
  uint8_t* bytes = scratch.take<uint8_t>(unpack ? w.group * kStrip : 0);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / w.strips * kRowBlock, strip = task % w.strips;
    const int64_t rows = a.M - row < kRowBlock ? a.M - row : kRowBlock;
    for (int64_t i = 0; i < rows * kStrip; ++i) sums[i] = 0.0f;
    const uint8_t* lines = w.packed + strip * w.strip_bytes;
    for (int64_t g = 0; g < w.groups; ++g, lines += w.group_bytes) {
      const Parameters p = load_parameters(lines + w.group_bytes - kLine);
      if (unpack) unpack_group<F>(lines, w.group, bytes);
      for (int64_t m = 0; m < rows; m += kIntRows) {
        const int64_t R = rows - m < kIntRows ? rows - m : kIntRows;
        if (unpack) {
          panel_rows<F, false, kIntRows>(a, bytes, p, row + m, g, R, sums + m * kStrip);
        } else {
          panel_rows<F, true, kIntRows>(a, lines, p, row + m, g, R, sums + m * kStrip);
        }
      }
    }
    finish_strip<float>(a, sums, row, rows, strip);
  }
}

void matmul_int8(const MatmulArgs& a, int64_t begin, int64_t end) noexcept {
  a.weight.format == Format::int4 ? run<Format::int4>(a, begin, end) : run<Format::int8>(a, begin, end);
}

}  // namespace fastweights::quantization::FW_LEVEL
