// dx = dy W for bfloat16 in the tile registers of AMX.
//
// dx^T = W^T dy^T. A tile of W^T is [16 inputs][32 outputs], as decoding gives it; one of dy^T has for every pair of
// outputs a row of 16 words, word m being the pair of row m; one of dx^T is [16 inputs][16 rows].
#include "quantization/tiles.h"

namespace fastweights::quantization::FW_LEVEL {

#if defined(__AVX512BF16__) && defined(__x86_64__)

constexpr int64_t kPanel = 8;  // tiles of outputs that are decoded at once
constexpr int64_t kInputTiles = kBackwardInputs / kSide;

FW_INLINE int64_t output_tiles(const Weight& w) {
  return (w.strips + 1) / 2;
}

static uint32_t* transposed_rows(const BackwardArgs& a, const Rows& rows) {
  return static_cast<uint32_t*>(a.transposed) + rows.first * output_tiles(a.weight) * kSide;
}

// Pairs [2n, 2n + 32) of row m of dy, zeros beyond.
FW_INLINE Vec<float> pairs_of(const BackwardArgs& a, int64_t m, int64_t n) {
  const int64_t left = m < a.M ? a.weight.N - n : 0;
  const bfloat16* dy = static_cast<const bfloat16*>(a.dy) + m * a.dy_stride + n;
  if (left >= 2 * kSide) return bit_cast<Vec<float>>(_mm512_loadu_si512(dy));
  alignas(64) bfloat16 some[2 * kSide] = {};
  for (int64_t i = 0; i < left; ++i) some[i] = dy[i];
  return load(reinterpret_cast<const float*>(some));
}

static void transpose_rows(const BackwardArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t tiles = kBackwardOutputs / 2 / kSide;
  for (int64_t task = begin; task < end; ++task) {
    const Rows rows = rows_of(a, kSide, task / a.panels);
    const int64_t first = task % a.panels * tiles, left = output_tiles(a.weight) - first;
    const int64_t count = left < tiles ? left : tiles;
    for (int64_t n = first; n < first + count; ++n) {
      uint32_t* out = transposed_rows(a, rows) + n * kSide * rows.columns;
      for (int64_t m = 0; m < rows.columns; m += kSide, out += kTile) {
        transpose_tile([&](int i) { return pairs_of(a, rows.first + m + i, 2 * n * kSide); }, out);
      }
    }
  }
}

using Decode = void (*)(const Weight& w, const uint8_t* strip, const Inputs& inputs, int64_t s, uint16_t* panel);

// To tiles [inputs / 16][outputs / 32] of bfloat16 of a panel that has this strip as its s-th.
template <Format F>
static void decode_strip(const Weight& w, const uint8_t* strip, const Inputs& inputs, int64_t s, uint16_t* panel) {
  decode_inputs<F>(w, strip, inputs.first, inputs.first + inputs.padded,
                   [&](int64_t i, const Vec<float>* v) __attribute__((always_inline)) {
                     FW_UNROLL
                     for (int t = 0; t < 4; ++t) {
                       const int64_t r = i + t;
                       uint16_t* to =
                           panel + (r / kSide * kPanel + s / 2) * 2 * kTile + (r % kSide * 2 + s % 2) * kSide;
                       *reinterpret_cast<__m256bh*>(to) = _mm512_cvtneps_pbh(bit_cast<__m512>(v[t]));
                     }
                   });
}

// The panel's strips from `strip` on, then zeros where a tile has no second strip: its gradients are zeros, but what
// lies in memory might be NaN. Returns its tiles of outputs.
static int64_t decode_panel(const Weight& w, Decode decode, int64_t strip, const Inputs& inputs, uint16_t* panel) {
  const int64_t strips = w.strips - strip < 2 * kPanel ? w.strips - strip : 2 * kPanel;
  for (int64_t s = 0; s < strips; ++s) decode(w, w.packed + (strip + s) * w.strip_bytes, inputs, s, panel);
  for (int64_t r = 0; strips % 2 && r < inputs.padded; ++r) {
    uint16_t* to = panel + (r / kSide * kPanel + strips / 2) * 2 * kTile + (r % kSide * 2 + 1) * kSide;
    __builtin_memset(to, 0, 2 * kSide);
  }
  return (strips + 1) / 2;
}

// A tile of sums, transposed, to the rows and inputs that there are.
static void store_rows(const BackwardArgs& a, const Rows& rows, const Inputs& inputs, int64_t tile, int64_t k,
                       const float* sums) {
  alignas(64) float t[kTile];
  transpose_tile([&](int i) { return load(sums + i * kSide); }, reinterpret_cast<uint32_t*>(t));
  const int64_t first = tile * kSide, left = rows.count - first, count = left < kSide ? left : kSide;
  const int64_t width = inputs.count - k < kSide ? inputs.count - k : kSide;
  bfloat16* out = static_cast<bfloat16*>(a.dx) + (rows.first + first) * a.weight.K + inputs.first + k;
  for (int64_t m = 0; m < count; ++m, out += a.weight.K) {
    width == kSide ? store_as(out, load(t + m * kSide)) : store_as(out, load(t + m * kSide), width);
  }
}

static void run(const BackwardArgs& a, int64_t begin, int64_t end) {
  const Weight& w = a.weight;
  const auto decode = with_format(w.format, []<Format F>(FormatTag<F>) -> Decode { return &decode_strip<F>; });
  constexpr int64_t panel_size = kInputTiles * kPanel * 2 * kTile;
  Scratch scratch(Scratch::take_bytes<uint16_t>(panel_size) +
                  Scratch::take_bytes<float>(kBackwardInputs * kBackwardRows));
  uint16_t* panel = scratch.take<uint16_t>(panel_size);
  float* dx = scratch.take<float>(kBackwardInputs * kBackwardRows);
  configure_tiles();
  for (int64_t task = begin; task < end; ++task) {
    const Rows rows = rows_of(a, kSide, task / a.chunks);
    const Inputs inputs = inputs_of(a, task % a.chunks);
    const int64_t columns = rows.columns / kSide, step = rows.columns * kSide;
    const uint32_t* dy = transposed_rows(a, rows);
    for (int64_t i = 0; i < kInputTiles * step; ++i) dx[i] = 0;
    for (int64_t strip = 0; strip < w.strips; strip += 2 * kPanel, dy += kPanel * step) {
      const int64_t tiles = decode_panel(w, decode, strip, inputs, panel);
      for (int64_t k = 0; k * kSide < inputs.padded; k += 2) {
        const TileRows pair{reinterpret_cast<const uint32_t*>(panel) + k * kPanel * kTile, kPanel * kTile, kTile};
        for (int64_t m = 0; m < columns; m += 2) {
          tile_block(2, columns - m, pair, {dy + m * kTile, kTile, step}, tiles, Sums::go_on, dx + k * step + m * kTile,
                     step, kTile);
        }
      }
    }
    for (int64_t m = 0; m < columns; ++m) {
      for (int64_t k = 0; k < inputs.count; k += kSide)
        store_rows(a, rows, inputs, m, k, dx + k / kSide * step + m * kTile);
    }
  }
  release_tiles();
}

#else  // never called

static void transpose_rows(const BackwardArgs&, int64_t, int64_t) {}
static void run(const BackwardArgs&, int64_t, int64_t) {}

#endif

void transpose_dy_tiles(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  transpose_rows(a, begin, end);
}

void backward_tiles(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  run(a, begin, end);
}

}  // namespace fastweights::quantization::FW_LEVEL
