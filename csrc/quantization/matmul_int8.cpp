// y = x W^T with x quantized to int8 per 32 inputs. Sums inside a block are integers, hence exact; the floating-point
// sum over blocks runs in the order of k for every row alike. So a row's result is the same bits for any number of
// rows, tile and thread count.
#include "core/scratch.h"
#include "quantization/dot.h"
#include "quantization/epilogue.h"

namespace fastweights::quantization::FW_LEVEL {

// What a tile reads its bytes from, a run of quartets at a time: the packed codes of a format,
template <Format F, int Quartets>
struct Packed {
  static constexpr Bytes bytes = kBytes<F>;
  static constexpr int quartets = Quartets;
  static constexpr int run = kRun<F>;
  static constexpr int64_t run_bytes = kRunBytes<F>;
  static constexpr bool streamed = true;
  FW_INLINE Words at(const uint8_t* lines, int u, int part) { return code_bytes<F>(lines, u, part); }
};

// or lines with a quartet each.
template <Bytes B, int Quartets>
struct Unpacked {
  static constexpr Bytes bytes = B;
  static constexpr int quartets = Quartets;
  static constexpr int run = 2;
  static constexpr int64_t run_bytes = 2 * kLine;
  static constexpr bool streamed = false;
  FW_INLINE Words at(const uint8_t* lines, int u, int part) { return load_words(lines + u * kLine, part); }
};

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
template <typename Source, int R, int S>
static __attribute__((noinline)) void group_tile(const Group& group, const int8_t* codes, const float* scales,
                                                 const int32_t* code_sums, const float* group_sums, int64_t row) {
  using D = Dot<Source::bytes>;
  constexpr int V = S * kParts;
  const uint8_t* lines = group.lines;
  Vec<float> part[R][V] = {};
  for (int64_t b = 0; b < group.blocks; ++b) {
    Words acc[R][V];
    FW_UNROLL
    for (int r = 0; r < R; ++r) {
      FW_UNROLL
      for (int i = 0; i < V; ++i) acc[r][i] = D::start(code_sums[b * R + r]);
    }
    // One run at a time; unrolled further, the loads are hoisted and the accumulators spill.
#pragma GCC unroll 1
    for (int q = 0; q < Source::quartets; q += Source::run, lines += Source::run_bytes) {
      FW_UNROLL
      for (int u = 0; u < Source::run; ++u) {
        Words w[V];
        FW_UNROLL
        for (int i = 0; i < V; ++i) w[i] = Source::at(lines + i / kParts * group.stride, u, i % kParts);
        FW_UNROLL
        for (int r = 0; r < R; ++r) {
          int32_t four;
          __builtin_memcpy(&four, codes + ((q + u) * R + r) * 4, 4);
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
    codes += 4 * Source::quartets * R;
    if constexpr (Source::streamed) {
      FW_UNROLL
      for (int64_t i = 0; i < Source::quartets / Source::run * Source::run_bytes; i += kLine)
        prefetch(lines + kAhead + i);
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

// The parameters of a group for sums of integers.
template <Format F>
FW_INLINE Parameters image_parameters(const Weight& w, const uint8_t* strip, int64_t g) {
  Parameters p = load_parameters<F>(w, strip, g);
  FW_UNROLL
  for (int i = 0; i < kParts; ++i) p.scale[i] *= image_unit<F>();
  return p;
}

// The codes of a group as bytes; the group behind it is on its way while many rows meet this one.
template <Format F>
static void unpack_group(const Weight& w, const uint8_t* run, uint8_t* out) {
  for (int64_t k = 0; k < w.group; k += 4 * kRun<F>, run += kRunBytes<F>, out += kRun<F> * kLine) {
    FW_UNROLL
    for (int64_t i = 0; i < kRunBytes<F>; i += kLine) prefetch(run + w.group_bytes + i);
    FW_UNROLL
    for (int i = 0; i < kParts; ++i) {
      FW_UNROLL
      for (int u = 0; u < kRun<F>; ++u) {
        store(reinterpret_cast<int32_t*>(out + u * kLine) + i * kWords, code_bytes<F>(run, u, i));
      }
    }
  }
}

// Rows [row, row + rows) of x, a panel, of which `local` is the first one's number in its block of rows.
template <typename Source, int S, int R>
FW_INLINE void panel_rows(const MatmulArgs& a, const Group& group, int64_t row, int64_t local, int64_t g,
                          int64_t rows) {
  if constexpr (R > 0) {
    if (rows != R) return panel_rows<Source, S, R - 1>(a, group, row, local, g, rows);
    const Weight& w = a.weight;
    const int64_t block = panel_offset(a.M, w.groups, row, g, group.blocks);
    group_tile<Source, R, S>(group, a.x.codes + panel_offset(a.M, w.groups, row, g, w.group), a.x.scales + block,
                             a.x.code_sums + block,
                             static_cast<const float*>(a.x.sums) + panel_offset(a.M, w.groups, row, g, 1), local);
  }
}

// S strips from `strip` on times the rows [row, row + rows). A source that is not of this format reads what
// unpack_group makes of the strips, unless their lines are bytes already.
template <Format F, typename Source, int S>
static void run_strips(const MatmulArgs& a, int64_t row, int64_t rows, int64_t strip, float* sums, uint8_t* bytes) {
  constexpr bool unpack = Source::run_bytes * kRun<F> != kRunBytes<F> * Source::run;
  const Weight& w = a.weight;
  const int64_t unpacked = w.group * kStrip;
  const uint8_t* first = w.packed + strip * w.strip_bytes;
  Parameters parameters[S];
  for (int s = 0; s < S; ++s) {
    for (int64_t i = 0; i < rows * kStrip; ++i) sums[s * kRowBlock * kStrip + i] = 0.0f;
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int s = 0; s < S; ++s) {
      const uint8_t* of_strip = first + s * w.strip_bytes;
      parameters[s] = image_parameters<F>(w, of_strip, g);
      if constexpr (unpack) unpack_group<F>(w, lines_of<F>(w, of_strip, g), bytes + s * unpacked);
    }
    const Group group{unpack ? bytes : lines_of<F>(w, first, g), unpack ? unpacked : w.strip_bytes,
                      w.group / (4 * Source::quartets), parameters, sums};
    for (int64_t m = 0; m < rows; m += kIntRows) {
      const int64_t R = rows - m < kIntRows ? rows - m : kIntRows;
      panel_rows<Source, S, kIntRows>(a, group, row + m, m, g, R);
    }
  }
  for (int s = 0; s < S; ++s) finish_strip<float>(a, sums + s * kRowBlock * kStrip, row, rows, strip + s);
}

template <Format F, int Quartets>
static void run(const MatmulArgs& a, int64_t begin, int64_t end) {
  constexpr int S = kStripsAtOnce;
  using Bytes = Unpacked<kBytes<F>, Quartets>;
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
      run_strips<F, Bytes, S>(a, row, rows, strip, sums, bytes);
      task += S;
    } else {
      a.M > kIntRows ? run_strips<F, Bytes, 1>(a, row, rows, strip, sums, bytes)
                     : run_strips<F, Packed<F, Quartets>, 1>(a, row, rows, strip, sums, bytes);
      task += 1;
    }
  }
}

void matmul_int8(const MatmulArgs& a, int64_t begin, int64_t end) noexcept {
  with_format(a.weight.format, [&]<Format F>(FormatTag<F>) {
    if constexpr (takes_small_groups(F)) {
      if (a.weight.group == kSmallGroup) return run<F, int(kSmallGroup) / 4>(a, begin, end);
    }
    if constexpr (takes_int8(F)) run<F, kQuartets<F>>(a, begin, end);
  });
}

}  // namespace fastweights::quantization::FW_LEVEL
