// dx = dy W for bfloat16 in the tile registers of AMX: 16 rows of 64 bytes each, one instruction for 16 x 16 sums over
// 32 outputs. The decoded weight is rounded to bfloat16, as dy is; sums are float.
//
// dx^T = W^T dy^T. A tile of W^T is [16 inputs][32 outputs], as decoding gives it; one of dy^T has for every pair of
// outputs a row of 16 words, word m being the pair of row m; one of dx^T is [16 inputs][16 rows]. Tiles lie one after
// another in memory.
#include "core/scratch.h"
#include "quantization/backward.h"

namespace fastweights::quantization::FW_LEVEL {

#if defined(__AVX512BF16__) && defined(__x86_64__)

#define FW_TILES __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t kSide = 16;             // rows of a tile, 32-bit words of a row
constexpr int64_t kTile = kSide * kSide;  // words of a tile
constexpr int64_t kPanel = 8;             // tiles of outputs that are decoded at once
constexpr int64_t kInputTiles = kBackwardInputs / kSide;

FW_INLINE int64_t output_tiles(const Weight& w) {
  return (w.strips + 1) / 2;
}

static uint32_t* transposed_rows(const BackwardArgs& a, const Rows& rows) {
  return static_cast<uint32_t*>(a.transposed) + rows.first * output_tiles(a.weight) * kSide;
}

static void transpose(const BackwardArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t tiles = kBackwardOutputs / 2 / kSide;
  for (int64_t task = begin; task < end; ++task) {
    const Rows rows = rows_of(a, kSide, task / a.panels);
    const int64_t first = task % a.panels * tiles, left = output_tiles(a.weight) - first;
    const int64_t count = left < tiles ? left : tiles;
    uint32_t* out = transposed_rows(a, rows) + first * kSide * rows.columns;
    for (int64_t i = 0; i < count * kSide * rows.columns; ++i) out[i] = 0;
    for (int64_t m = 0; m < rows.count; ++m) {
      const bfloat16* dy = static_cast<const bfloat16*>(a.dy) + (rows.first + m) * a.dy_stride;
      for (int64_t i = 0; i < count * kSide; ++i) {
        const int64_t n = 2 * (first * kSide + i);
        const uint32_t low = n < a.weight.N ? dy[n].bits : 0, high = n + 1 < a.weight.N ? dy[n + 1].bits : 0;
        out[(i / kSide * rows.columns + m / kSide * kSide + i % kSide) * kSide + m % kSide] = low | high << 16;
      }
    }
  }
}

// Inputs [begin, end) of a group, to tiles [inputs / 16][outputs / 32] of bfloat16; `row` is the first one's in the
// panel, which has this strip as its s-th.
template <Format F>
static void decode_group(const Weight& w, const uint8_t* strip, int64_t g, int64_t begin, int64_t end, int64_t row,
                         int64_t s, uint16_t* panel) {
  const Parameters p = load_parameters<F>(w, strip, g);
  const uint8_t* run = lines_of<F>(w, strip, g) + begin / 4 / kRun<F> * kRunBytes<F>;
  for (int64_t k = begin; k < end; k += 4 * kRun<F>, run += kRunBytes<F>, row += 4 * kRun<F>) {
    FW_UNROLL
    for (int u = 0; u < kRun<F>; ++u) {
      const Words words = code_words<F>(run, u, 0);
      FW_UNROLL
      for (int t = 0; t < 4; ++t) {
        const int64_t r = row + 4 * u + t;
        const Vec<float> v = fma(p.scale[0] * level_unit<F>(t), level_at<F>(words, t), p.minimum[0]);
        uint16_t* to = panel + (r / kSide * kPanel + s / 2) * 2 * kTile + (r % kSide * 2 + s % 2) * kSide;
        *reinterpret_cast<__m256bh*>(to) = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
      }
    }
  }
}

using Decode = void (*)(const Weight& w, const uint8_t* strip, const Inputs& inputs, int64_t s, uint16_t* panel);

template <Format F>
static void decode_inputs(const Weight& w, const uint8_t* strip, const Inputs& inputs, int64_t s, uint16_t* panel) {
  for_groups(w, inputs.first, inputs.first + inputs.padded, [&](int64_t g, int64_t from, int64_t to) {
    decode_group<F>(w, strip, g, from, to, g * w.group + from - inputs.first, s, panel);
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

// Two tiles of inputs by C (1 or 2) of rows: sums += over `tiles` tiles of outputs, those of dy dy_step words apart.
template <int C>
FW_TILES static __attribute__((noinline)) void tile_block(const uint16_t* panel, const uint32_t* dy, int64_t dy_step,
                                                          int64_t tiles, float* sums, int64_t sums_step) {
  constexpr int64_t bytes = 4 * kSide;
  asm volatile("" ::: "memory");  // tile loads do not say that they read memory
  _tile_loadd(0, sums, bytes);
  _tile_loadd(2, sums + sums_step, bytes);
  if constexpr (C == 2) {
    _tile_loadd(1, sums + kTile, bytes);
    _tile_loadd(3, sums + sums_step + kTile, bytes);
  }
  for (int64_t n = 0; n < tiles; ++n, panel += 2 * kTile, dy += dy_step) {
    _tile_loadd(4, panel, bytes);
    _tile_loadd(5, panel + kPanel * 2 * kTile, bytes);
    _tile_loadd(6, dy, bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 2) {
      _tile_loadd(7, dy + kTile, bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(2, sums + sums_step, bytes);
  if constexpr (C == 2) {
    _tile_stored(1, sums + kTile, bytes);
    _tile_stored(3, sums + sums_step + kTile, bytes);
  }
  asm volatile("" ::: "memory");
}

FW_TILES static void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 4 * kSide;
    config.rows[i] = kSide;
  }
  asm volatile("" ::: "memory");
  _tile_loadconfig(&config);
}

FW_TILES static void release() {
  _tile_release();
}

static void run(const BackwardArgs& a, int64_t begin, int64_t end) {
  const Weight& w = a.weight;
  const auto decode = with_format(w.format, []<Format F>(FormatTag<F>) -> Decode { return &decode_inputs<F>; });
  constexpr int64_t panel_size = kInputTiles * kPanel * 2 * kTile;
  Scratch scratch(Scratch::take_bytes<uint16_t>(panel_size) +
                  Scratch::take_bytes<float>(kBackwardInputs * kBackwardRows));
  uint16_t* panel = scratch.take<uint16_t>(panel_size);
  float* dx = scratch.take<float>(kBackwardInputs * kBackwardRows);
  configure();
  for (int64_t task = begin; task < end; ++task) {
    const Rows rows = rows_of(a, kSide, task / a.chunks);
    const Inputs inputs = inputs_of(a, task % a.chunks);
    const int64_t columns = rows.columns / kSide, step = rows.columns * kSide;
    const uint32_t* dy = transposed_rows(a, rows);
    for (int64_t i = 0; i < kInputTiles * step; ++i) dx[i] = 0;
    for (int64_t strip = 0; strip < w.strips; strip += 2 * kPanel, dy += kPanel * step) {
      const int64_t tiles = decode_panel(w, decode, strip, inputs, panel);
      for (int64_t k = 0; k * kSide < inputs.padded; k += 2) {
        const uint16_t* pair = panel + k * kPanel * 2 * kTile;
        int64_t m = 0;
        for (; m + 2 <= columns; m += 2) {
          tile_block<2>(pair, dy + m * kTile, step, tiles, dx + k * step + m * kTile, step);
        }
        if (m < columns) tile_block<1>(pair, dy + m * kTile, step, tiles, dx + k * step + m * kTile, step);
      }
    }
    for (int64_t m = 0; m < rows.count; ++m) {
      bfloat16* out = static_cast<bfloat16*>(a.dx) + (rows.first + m) * w.K + inputs.first;
      const float* from = dx + m / kSide * kTile + m % kSide;
      for (int64_t k = 0; k < inputs.count; ++k) {
        out[k] = from_compute<bfloat16>(from[k / kSide * step + k % kSide * kSide]);
      }
    }
  }
  release();
}

#else  // never called

static void transpose(const BackwardArgs&, int64_t, int64_t) {}
static void run(const BackwardArgs&, int64_t, int64_t) {}

#endif

void transpose_dy_tiles(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  transpose(a, begin, end);
}

void backward_tiles(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  run(a, begin, end);
}

}  // namespace fastweights::quantization::FW_LEVEL
