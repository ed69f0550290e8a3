// y = x W^T for bfloat16 in the tile registers of AMX. A tile of x is [16 rows][32 inputs], one of W^T has for every
// pair of inputs a row of 16 words, word n being the pair of output n, one of y is [16 rows][16 outputs]. A row's
// result depends on that row alone: rows of a tile do not meet, and every row goes through the inputs in the same
// panels.
#include "quantization/epilogue.h"
#include "quantization/tiles.h"

namespace fastweights::quantization::FW_LEVEL {

#if defined(__AVX512BF16__) && defined(__x86_64__)

constexpr int64_t kPanel = 16;  // tiles of inputs that are decoded at once
constexpr int64_t kPairs = 4;   // pairs of strips that they are decoded for
static_assert(kTileRows % kSide == 0);

FW_INLINE int64_t input_tiles(const Weight& w) {
  return (w.groups * w.group + 2 * kSide - 1) / (2 * kSide);
}

static void pack(const ActivationArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t bytes = 4 * kSide;
  const int64_t tiles = (a.groups * a.group + 2 * kSide - 1) / (2 * kSide);
  for (int64_t task = begin; task < end; ++task) {
    uint8_t* out = static_cast<uint8_t*>(a.out.values) + task * tiles * kSide * bytes;
    for (int64_t i = 0; i < kSide; ++i, out += bytes) {
      const int64_t m = task * kSide + i, whole = m < a.M ? a.K / (2 * kSide) : 0;
      const bfloat16* x = static_cast<const bfloat16*>(a.x) + m * a.x_stride;
      for (int64_t t = 0; t < whole; ++t) __builtin_memcpy(out + t * kSide * bytes, x + t * 2 * kSide, bytes);
      for (int64_t t = whole; t < tiles; ++t) __builtin_memset(out + t * kSide * bytes, 0, bytes);
      if (m < a.M && a.K % (2 * kSide)) {
        __builtin_memcpy(out + whole * kSide * bytes, x + whole * 2 * kSide,
                         size_t(a.K % (2 * kSide)) * sizeof(bfloat16));
      }
    }
  }
}

// Half of the last bit that bfloat16 keeps is added, so that cutting off the rest rounds to the nearest, ties away from
// zero: cheaper than the conversion.
FW_INLINE Words prepared(Vec<float> v) {
  return bit_cast<Words>(v) + 0x8000;
}

// Two vectors as pairs: lane n is first[n] and, above it, second[n].
FW_INLINE __m512i pairs_of(Vec<float> first, Vec<float> second) {
  const __m512i upper_halves = _mm512_set_epi16(63, 31, 61, 29, 59, 27, 57, 25, 55, 23, 53, 21, 51, 19, 49, 17, 47, 15,
                                                45, 13, 43, 11, 41, 9, 39, 7, 37, 5, 35, 3, 33, 1);
  return _mm512_permutex2var_epi16(bit_cast<__m512i>(prepared(first)), upper_halves,
                                   bit_cast<__m512i>(prepared(second)));
}

FW_INLINE Vec<float> rounded(Vec<float> v) {
  return bit_cast<Vec<float>>(prepared(v) & int32_t(0xffff0000));
}

using Decode = void (*)(const Weight& w, const uint8_t* strip, int64_t begin, int64_t tiles, uint32_t* panel);

// `tiles` tiles from input `begin` on; zeros where the last one has no inputs, since what lies in memory might be NaN.
template <Format F>
static void decode_panel(const Weight& w, const uint8_t* strip, int64_t begin, int64_t tiles, uint32_t* panel) {
  const int64_t coded = w.groups * w.group, end = begin + tiles * 2 * kSide;
  decode_inputs<F>(w, strip, begin, end < coded ? end : coded,
                   [&](int64_t i, const Vec<float>* v) __attribute__((always_inline)) {
                     _mm512_storeu_si512(panel + i / 2 * kSide, pairs_of(v[0], v[1]));
                     _mm512_storeu_si512(panel + (i / 2 + 1) * kSide, pairs_of(v[2], v[3]));
                   });
  if (coded < end) __builtin_memset(panel + (coded - begin) / 2 * kSide, 0, size_t(end - coded) * 2 * kSide);
}

// The sums of one strip for one row, x being its numbers as float: those of the even and of the odd inputs of a tile
// apart, then their sum to the sums so far.
template <Format F>
static Vec<float> strip_row(const Weight& w, const uint8_t* strip, const float* x) {
  Vec<float> sums = zero<float>(), even = sums, odd = sums;
  decode_inputs<F>(w, strip, 0, w.groups * w.group, [&](int64_t i, const Vec<float>* v) __attribute__((always_inline)) {
    even = fma(set1(x[i]), rounded(v[0]), even);
    odd = fma(set1(x[i + 1]), rounded(v[1]), odd);
    even = fma(set1(x[i + 2]), rounded(v[2]), even);
    odd = fma(set1(x[i + 3]), rounded(v[3]), odd);
    if (i % (2 * kSide) == 2 * kSide - 4) {
      sums += even + odd;
      even = odd = zero<float>();
    }
  });
  return sums + (even + odd);
}

static void run_row(const MatmulArgs& a, int64_t begin, int64_t end) {
  const Weight& w = a.weight;
  const auto strip_sums = with_format(w.format, []<Format F>(FormatTag<F>) { return &strip_row<F>; });
  const int64_t tiles = input_tiles(w);
  Scratch scratch(Scratch::take_bytes<float>(tiles * 2 * kSide));
  float* x = scratch.take<float>(tiles * 2 * kSide);
  for (int64_t i = 0; i < tiles * 2; ++i) {
    store(x + i * kSide, load_as(static_cast<const bfloat16*>(a.x.values) + (i / 2 * 2 * kSide + i % 2) * kSide));
  }
  for (int64_t strip = 2 * begin; strip < 2 * end && strip < w.strips; ++strip) {
    alignas(64) float sums[kStrip];
    store(sums, strip_sums(w, w.packed + strip * w.strip_bytes, x));
    finish_strip<float>(a, sums, 0, 1, strip);
  }
}

static void run(const MatmulArgs& a, int64_t begin, int64_t end) {
  if (a.M == 1) return run_row(a, begin, end);
  const Weight& w = a.weight;
  const auto decode = with_format(w.format, []<Format F>(FormatTag<F>) -> Decode { return &decode_panel<F>; });
  constexpr int64_t panel_words = kPanel * kTile, sums_size = kTileRows * kStrip;  // of a strip
  Scratch scratch(Scratch::take_bytes<uint32_t>(2 * kPairs * panel_words) +
                  Scratch::take_bytes<float>(2 * kPairs * sums_size));
  uint32_t* panel = scratch.take<uint32_t>(2 * kPairs * panel_words);
  float* sums = scratch.take<float>(2 * kPairs * sums_size);
  const int64_t tiles = input_tiles(w), pairs = (w.strips + 1) / 2;
  configure_tiles();
  for (int64_t task = begin; task < end;) {
    const int64_t row = task / pairs * kTileRows, rows = a.M - row < kTileRows ? a.M - row : kTileRows;
    const int64_t row_tiles = (rows + kSide - 1) / kSide, strip = 2 * (task % pairs);
    const int64_t most = end - task < kPairs ? end - task : kPairs;
    const int64_t strips = w.strips - strip < 2 * most ? w.strips - strip : 2 * most;
    for (int64_t s = 0; s < strips; ++s) {
      for (int64_t i = 0; i < row_tiles * kTile; ++i) sums[s * sums_size + i] = 0;
    }
    for (int64_t k = 0; k < tiles; k += kPanel) {
      const int64_t terms = tiles - k < kPanel ? tiles - k : kPanel;
      for (int64_t s = 0; s < strips; ++s) {
        decode(w, w.packed + (strip + s) * w.strip_bytes, k * 2 * kSide, terms, panel + s * panel_words);
      }
      const uint32_t* x = static_cast<const uint32_t*>(a.x.values) + (row / kSide * tiles + k) * kTile;
      for (int64_t s = 0; s < strips; s += 2) {
        for (int64_t r = 0; r < row_tiles; r += 2) {
          tile_block(row_tiles - r, strips - s, {x + r * tiles * kTile, tiles * kTile, kTile},
                     {panel + s * panel_words, panel_words, kTile}, terms, Sums::go_on,
                     sums + s * sums_size + r * kTile, kTile, sums_size);
        }
      }
    }
    for (int64_t s = 0; s < strips; ++s) finish_strip<float>(a, sums + s * sums_size, row, rows, strip + s);
    task += (strips + 1) / 2;
  }
  release_tiles();
}

#else  // never called

static void pack(const ActivationArgs&, int64_t, int64_t) {}
static void run(const MatmulArgs&, int64_t, int64_t) {}

#endif

void pack_tiles(const ActivationArgs& a, int64_t begin, int64_t end) noexcept {
  pack(a, begin, end);
}

void matmul_tiles(const MatmulArgs& a, int64_t begin, int64_t end) noexcept {
  run(a, begin, end);
}

}  // namespace fastweights::quantization::FW_LEVEL
