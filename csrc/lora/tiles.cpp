// Updates and gradients of bfloat16 rows in the tile registers of AMX. What is float32 there (A, B, u, h) is the sum of
// two numbers of bfloat16, high + low, to 16 bits:
//   in downᵀ   in (high + low)ᵀ, high and low being as many ranks each
//   c up       c_high up_high + c_low up_high + c_high up_low, as one product over three times the ranks
//   cᵀ in      (c_high + c_low)ᵀ in
// A number that is dropped is 0; the factor of the others comes in with the sums, so that nothing is rounded for it.
#include "core/tiles.h"
#include "core/scratch.h"
#include "lora/rows.h"

namespace fastweights::lora::FW_LEVEL {

#if defined(__AVX512BF16__) && defined(__x86_64__)

constexpr int64_t kPair = 2 * kSide;  // numbers of a row of a tile
constexpr int64_t kPanel = 32;        // tiles of columns, or of rows, that are packed at once
constexpr int64_t kColumnTiles = 16;  // of out

FW_INLINE int64_t tiles_of(int64_t n, int64_t side) {
  return (n + side - 1) / side;
}

// ---- numbers -----------------------------------------------------------------------------------------------------

FW_INLINE Vec<float> high_of(Vec<float> v) {
  return bit_cast<Vec<float>>(_mm512_cvtpbh_ps(_mm512_cvtneps_pbh(bit_cast<__m512>(v))));
}

// An infinite or NaN number has no rest: infinity less itself would be NaN where it is no longer the first.
FW_INLINE Vec<float> low_of(Vec<float> v) {
  const Vec<float> rest = v - high_of(v);
  return rest == rest ? rest : zero<float>();
}

// Numbers of bfloat16: those of `first`, then those of `second`.
FW_INLINE __m512i halves(Vec<float> first, Vec<float> second) {
  return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first)));
}

FW_INLINE Vec<float> as_words(__m512i v) {
  return bit_cast<Vec<float>>(v);
}

// Pairs of the lanes of two vectors of bfloat16: lanes [0, 16) for Upper = 0, else [16, 32).
template <int Upper>
FW_INLINE __m512i pairs_of(__m512i first, __m512i second) {
  alignas(64) uint16_t order[32];
  FW_UNROLL
  for (int i = 0; i < 16; ++i) {
    order[2 * i] = uint16_t(16 * Upper + i);
    order[2 * i + 1] = uint16_t(32 + 16 * Upper + i);
  }
  return _mm512_permutex2var_epi16(first, _mm512_load_si512(order), second);
}

FW_INLINE uint32_t first_bits(int64_t n) {
  return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0;
}

// Which of 32 columns from j on are kept.
FW_INLINE uint32_t kept(const Dropout& d, uint64_t key, int64_t j) {
  const __m512i limit = _mm512_set1_epi32(int(d.threshold));
  const uint32_t low = _mm512_cmplt_epu32_mask(bit_cast<__m512i>(random_bits(key, j)), limit);
  const uint32_t high = _mm512_cmplt_epu32_mask(bit_cast<__m512i>(random_bits(key, j + kSide)), limit);
  return low | high << 16;
}

// 32 numbers of a row from column j on, zeros where it ends and where they are dropped.
FW_INLINE __m512i load_pairs(const bfloat16* row, int64_t columns, int64_t j, const Dropout& d, uint64_t key) {
  uint32_t mask = first_bits(columns - j);
  if (d.on) mask &= kept(d, key, j);
  return _mm512_maskz_loadu_epi16(mask, row + j);
}

FW_INLINE Vec<float> load_floats(const float* row, int64_t columns, int64_t j) {
  return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16(first_bits(columns - j)), row + j));
}

// ---- operands ----------------------------------------------------------------------------------------------------

// Number q of the ranks and their rests.
FW_INLINE Vec<float> part_of_down(const TilesArgs& a, int64_t q, int64_t j) {
  if (q >= 2 * a.ranks) return zero<float>();
  const Vec<float> v = load_floats(static_cast<const float*>(a.rows[q % a.ranks]), a.columns, j);
  return q < a.ranks ? v : low_of(v);
}

// Tiles [columns / 32][2 ranks / 16], a row of which has for a pair of columns those of 16 ranks.
static void pack_down(const TilesArgs& a, int64_t task) {
  const int64_t ranks = tiles_of(2 * a.ranks, kSide);
  for (int64_t t = 0; t < ranks; ++t) {
    transpose_tile(
        [&](int i) __attribute__((always_inline)) {
          const int64_t q = t * kSide + i, j = task * kPair;
          return as_words(halves(part_of_down(a, q, j), part_of_down(a, q, j + kSide)));
        },
        a.out + (task * ranks + t) * kTile);
  }
}

FW_INLINE Vec<float> part_of_up(const TilesArgs& a, int64_t q, int64_t j) {
  if (q >= 3 * a.ranks) return zero<float>();
  const Vec<float> v = load_floats(static_cast<const float*>(a.rows[q % a.ranks]), a.columns, j);
  return q < 2 * a.ranks ? v : low_of(v);
}

// Tiles [columns / 16][3 ranks / 32], a row of which has for a pair of ranks those of 16 columns.
static void pack_up(const TilesArgs& a, int64_t task) {
  const int64_t ranks = tiles_of(3 * a.ranks, kPair), j = task * kSide;
  for (int64_t p = 0; p < ranks * kSide; ++p) {
    const __m512i both = halves(part_of_up(a, 2 * p, j), part_of_up(a, 2 * p + 1, j));
    const __m512i upper = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(both, 1));
    _mm512_storeu_si512(a.out + (task * ranks * kSide + p) * kSide, pairs_of<0>(both, upper));
  }
}

static void pack(const TilesArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) a.up ? pack_up(a, task) : pack_down(a, task);
}

// ---- the update --------------------------------------------------------------------------------------------------

// A block of rows, of which there are `tiles` tiles.
struct RowBlock {
  const bfloat16* in[kManyRows];
  bfloat16* out[kManyRows];
  float* c[kManyRows];
  uint64_t keys[kManyRows] = {};
  int64_t count, tiles;
};

// The sums of row i and columns [16 q, 16 q + 16), in tiles [column][row].
FW_INLINE float* sums_at(float* sums, int64_t i, int64_t q) {
  return sums + (q * 2 + i / kSide) * kTile + i % kSide * kSide;
}

// c[i, r] = in[i] . down[r], of the columns from `begin` on.
static void shrink(const RowBlock& b, int64_t begin, int64_t columns, const Dropout& dropout, const uint32_t* down,
                   int64_t rank, int64_t ranks) {
  const int64_t rank_tiles = tiles_of(2 * ranks, kSide), column_tiles = tiles_of(columns, kPair);
  Scratch scratch(Scratch::take_bytes<uint32_t>(kPanel * 2 * kTile) +
                  Scratch::take_bytes<float>(rank_tiles * 2 * kTile) +
                  Scratch::take_bytes<float>((rank_tiles + 1) * kSide));
  uint32_t* packed = scratch.take<uint32_t>(kPanel * 2 * kTile);
  float* sums = scratch.take<float>(rank_tiles * 2 * kTile);
  float* row = scratch.take<float>((rank_tiles + 1) * kSide);
  if (b.count < b.tiles * kSide) __builtin_memset(packed, 0, size_t(kPanel * 2 * kTile) * sizeof(uint32_t));
  for (int64_t first = 0; first < column_tiles; first += kPanel) {
    const int64_t terms = column_tiles - first < kPanel ? column_tiles - first : kPanel;
    // A few tiles at a time: what all of them have at one place lies in the same two sets of the cache.
    for (int64_t t0 = 0; t0 < terms; t0 += 4) {
      for (int64_t i = 0; i < b.count; ++i) {
        uint32_t* to = packed + (t0 * 2 + i / kSide) * kTile + i % kSide * kSide;
        for (int64_t t = t0; t < terms && t < t0 + 4; ++t, to += 2 * kTile) {
          _mm512_storeu_si512(to, load_pairs(b.in[i] + begin, columns, (first + t) * kPair, dropout, b.keys[i]));
        }
      }
    }
    for (int64_t r = 0; r < rank_tiles; r += 2) {
      tile_block(b.tiles, rank_tiles - r, {packed, kTile, 2 * kTile},
                 {down + (first * rank_tiles + r) * kTile, kTile, rank_tiles * kTile}, terms,
                 first ? Sums::go_on : Sums::begin, sums + r * 2 * kTile, kTile, 2 * kTile);
    }
  }
  const Vec<float> factor = set1(dropout.on ? float(dropout.factor) : 1.0f);
  for (int64_t i = 0; i < b.count; ++i) {
    for (int64_t q = 0; q < rank_tiles; ++q) {
      store(row + q * kSide, column_tiles ? load(sums_at(sums, i, q)) : zero<float>());
    }
    for_vectors<float>(ranks, [&](int64_t r, auto part) {
      store_as(b.c[i] + rank + r, factor * (load(row + r) + load_as(row + ranks + r, part)), part);
    });
  }
}

// A row of c as c_high, c_low, c_high.
static void split_row(const float* c, int64_t ranks, bfloat16* row) {
  for (int64_t part = 0; part < 3; ++part) {
    for (int64_t r = 0; r < ranks; r += kSide) {
      const Vec<float> v = load_floats(c, ranks, r);
      const __mmask16 mask = __mmask16(first_bits(ranks - r));
      const __m256i half = bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(part == 1 ? low_of(v) : v)));
      _mm256_mask_storeu_epi16(row + part * ranks + r, mask, half);
    }
  }
}

// 32 columns of out from j on, the first `n` of which are there.
FW_INLINE void add_sums(bfloat16* out, int64_t j, int64_t n, Vec<float> first, Vec<float> second,
                        const Dropout& dropout, uint64_t key) {
  if (dropout.on) {
    first *= keep<float>(dropout, key, j);
    second *= keep<float>(dropout, key, j + kSide);
  }
  const __mmask32 mask = first_bits(n);
  const __m512i y = _mm512_maskz_loadu_epi16(mask, out + j);
  const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(y)), 16);
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(y, 1)), 16);
  _mm512_mask_storeu_epi16(out + j, mask,
                           halves(first + bit_cast<Vec<float>>(low), second + bit_cast<Vec<float>>(high)));
}

// out[i, j] += sum over r of c[i, r] up[r, j]; rounded once.
static void expand(const RowBlock& b, int64_t begin, int64_t columns, const Dropout& dropout, const uint32_t* up,
                   int64_t rank, int64_t ranks) {
  const int64_t rank_tiles = tiles_of(3 * ranks, kPair), column_tiles = tiles_of(columns, kSide);
  const int64_t padded = rank_tiles * kPair;
  Scratch scratch(Scratch::take_bytes<uint32_t>(rank_tiles * 2 * kTile) + Scratch::take_bytes<bfloat16>(padded) +
                  Scratch::take_bytes<float>(kColumnTiles * 2 * kTile));
  uint32_t* packed = scratch.take<uint32_t>(rank_tiles * 2 * kTile);
  bfloat16* row = scratch.take<bfloat16>(padded);
  float* sums = scratch.take<float>(kColumnTiles * 2 * kTile);
  if (b.count < b.tiles * kSide) __builtin_memset(packed, 0, size_t(rank_tiles * 2 * kTile) * sizeof(uint32_t));
  __builtin_memset(row, 0, size_t(padded) * sizeof(bfloat16));
  for (int64_t i = 0; i < b.count; ++i) {
    split_row(b.c[i] + rank, ranks, row);
    uint32_t* to = packed + i / kSide * kTile + i % kSide * kSide;
    for (int64_t t = 0; t < rank_tiles; ++t)
      _mm512_storeu_si512(to + t * 2 * kTile, _mm512_loadu_si512(row + t * kPair));
  }
  // Several tiles before out is read: its rows lie apart, and no hardware fetches the next one ahead.
  for (int64_t t = 0; t < column_tiles; t += kColumnTiles) {
    const int64_t here = column_tiles - t < kColumnTiles ? column_tiles - t : kColumnTiles;
    for (int64_t q = 0; q < here; q += 2) {
      tile_block(b.tiles, here - q, {packed, kTile, 2 * kTile},
                 {up + (t + q) * rank_tiles * kTile, rank_tiles * kTile, kTile}, rank_tiles, Sums::begin,
                 sums + q * 2 * kTile, kTile, 2 * kTile);
    }
    for (int64_t i = 0; i < b.count; ++i) {
      for (int64_t q = 0; q < here; q += 2) {
        const int64_t j = (t + q) * kSide;  // where a second tile is missing, its columns are
        add_sums(b.out[i] + begin, j, columns - j, load(sums_at(sums, i, q)), load(sums_at(sums, i, q + 1)), dropout,
                 b.keys[i]);
      }
    }
  }
}

static void update_block(const UpdateArgs& a, const Block& block) {
  RowBlock b;
  b.count = block.count, b.tiles = tiles_of(block.count, kSide);
  const Dropout& dropout = a.in_dropout.on ? a.in_dropout : a.out_dropout;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t m = row_number(a.order, block.first + i);
    b.in[i] = row_of<const bfloat16>(a.in, m), b.out[i] = row_of<bfloat16>(a.out, m), b.c[i] = row_of<float>(a.c, m);
    if (dropout.on) b.keys[i] = row_key(dropout, m);
  }
  const int64_t group = block.part / a.parts_of_block;
  if (!a.backward) shrink(b, 0, a.in.columns, a.in_dropout, a.down_tiles[group], 0, block.ranks);
  for (int64_t i = block.part; i < block.part + a.parts_of_block; ++i) {
    const Part& p = a.parts[i];
    if (p.ranks == 0) continue;
    if (a.backward) {
      shrink(b, p.begin, p.columns, a.in_dropout, a.down_tiles[i], p.rank, p.ranks);
    } else {
      expand(b, p.begin, p.columns, a.out_dropout, a.up_tiles[i], p.rank, p.ranks);
    }
  }
  if (a.backward && a.out.data) expand(b, 0, a.out.columns, a.out_dropout, a.up_tiles[group], 0, block.ranks);
}

static void update_blocks(const UpdateArgs& a, int64_t begin, int64_t end) {
  configure_tiles();
  for (int64_t task = begin; task < end; ++task) update_block(a, a.blocks[task]);
  release_tiles();
}

// ---- the gradient ------------------------------------------------------------------------------------------------

// Rows [32 term, 32 term + 32) of c as tiles [2 ranks / 16][terms], a row of which has 32 rows of c of one rank.
static void pack_c(const ColumnsArgs& a, int64_t term, int64_t terms, float* rows) {
  const int64_t width = tiles_of(2 * a.ranks, kSide) * kSide;
  for (int64_t i = 0; i < kPair; ++i) {
    const int64_t m = term * kPair + i;
    const float* c = m < a.count ? row_of<const float>(a.c, row_number(a.order, a.first + m)) + a.column : nullptr;
    for (int64_t r = 0; r < a.ranks; r += kSide) {
      const Vec<float> v = c ? load_floats(c, a.ranks, r) : zero<float>();
      store(rows + i * width + r, v);
    }
    for (int64_t r = a.ranks; r < width; ++r) rows[i * width + r] = c && r < 2 * a.ranks ? c[r - a.ranks] : 0;
  }
  for (int64_t q = 0; q < width; q += kSide) {
    alignas(64) float columns[2][kTile];
    ::fastweights::FW_LEVEL::transpose<float>(kSide, kSide, rows + q, width, columns[0], kSide);
    ::fastweights::FW_LEVEL::transpose<float>(kSide, kSide, rows + kSide * width + q, width, columns[1], kSide);
    for (int64_t n = 0; n < kSide; ++n) {
      const Vec<float> low = load(columns[0] + n * kSide), high = load(columns[1] + n * kSide);
      _mm512_storeu_si512(a.out + (q / kSide * terms + term) * kTile + n * kSide,
                          q + n < a.ranks ? halves(low, high) : halves(low_of(low), low_of(high)));
    }
  }
}

static void pack_columns(const ColumnsArgs& a, int64_t begin, int64_t end) {
  const int64_t width = tiles_of(2 * a.ranks, kSide) * kSide;
  Scratch scratch(Scratch::take_bytes<float>(kPair * width));
  float* rows = scratch.take<float>(kPair * width);
  for (int64_t term = begin; term < end; ++term) pack_c(a, term, tiles_of(a.count, kPair), rows);
}

// Rows [first, first + 32 terms) of 64 columns of in as tiles [columns / 16][terms], a row of which has a pair of rows.
static void pack_in(const GradientArgs& a, const Block& g, int64_t column, int64_t first, int64_t terms,
                    uint32_t* out) {
  for (int64_t m = 0; m < terms * 2 * kSide; m += 2) {
    __m512i rows[2][2];
    for (int64_t i = 0; i < 2; ++i) {
      const bool there = first + m + i < g.count;
      const int64_t number = there ? row_number(a.order, g.first + first + m + i) : 0;
      const uint64_t key = there && a.in_dropout.on ? row_key(a.in_dropout, number) : 0;
      for (int64_t half = 0; half < 2; ++half) {
        rows[i][half] = there ? load_pairs(row_of<const bfloat16>(a.in, number), a.in.columns, column + half * kPair,
                                           a.in_dropout, key)
                              : _mm512_setzero_si512();
      }
    }
    uint32_t* to = out + m / (2 * kSide) * kTile + m / 2 % kSide * kSide;
    for (int64_t half = 0; half < 2; ++half) {
      _mm512_storeu_si512(to + 2 * half * kPanel * kTile, pairs_of<0>(rows[0][half], rows[1][half]));
      _mm512_storeu_si512(to + (2 * half + 1) * kPanel * kTile, pairs_of<1>(rows[0][half], rows[1][half]));
    }
  }
}

static void gradient_of(const GradientArgs& a, const Block& g, const uint32_t* c, int64_t column) {
  static_assert(kGradientColumns == 4 * kSide);
  if (g.ranks == 0) return;
  const int64_t rank_tiles = tiles_of(2 * g.ranks, kSide), all_terms = tiles_of(g.count, kPair);
  Scratch scratch(Scratch::take_bytes<uint32_t>(4 * kPanel * kTile) +
                  Scratch::take_bytes<float>(rank_tiles * 4 * kTile));
  uint32_t* in = scratch.take<uint32_t>(4 * kPanel * kTile);
  float* sums = scratch.take<float>(rank_tiles * 4 * kTile);
  for (int64_t first = 0; first < all_terms; first += kPanel) {
    const int64_t terms = all_terms - first < kPanel ? all_terms - first : kPanel;
    pack_in(a, g, column, first * kPair, terms, in);
    for (int64_t r = 0; r < rank_tiles; r += 2) {
      for (int64_t j = 0; j < 4; j += 2) {
        tile_block(rank_tiles - r, 2, {c + (r * all_terms + first) * kTile, all_terms * kTile, kTile},
                   {in + j * kPanel * kTile, kPanel * kTile, kTile}, terms, first ? Sums::go_on : Sums::begin,
                   sums + (r * 4 + j) * kTile, 4 * kTile, kTile);
      }
    }
  }
  const auto sum = [&](int64_t r, int64_t j) {
    return all_terms ? load(sums + (r / kSide * 4 + j / kSide) * kTile + r % kSide * kSide) : zero<float>();
  };
  const float kept = a.in_dropout.on ? float(a.in_dropout.factor) : 1.0f;
  for (int64_t r = 0; r < g.ranks; ++r) {
    const Vec<float> factor = set1(float(a.factors[g.rank + r]) * kept);
    float* out = row_of<float>(a.out, g.rank + r) + column;
    for (int64_t j = 0; j < kGradientColumns && column + j < a.in.columns; j += kSide) {
      const Vec<float> v = (sum(r, j) + sum(g.ranks + r, j)) * factor;
      const int64_t left = a.in.columns - column - j;
      left >= kSide ? store_as(out + j, v) : store_as(out + j, v, left);
    }
  }
}

static void gradients(const GradientArgs& a, int64_t begin, int64_t end) {
  configure_tiles();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t g = task / a.strips;
    gradient_of(a, a.groups[g], a.c_tiles[g], task % a.strips * kGradientColumns);
  }
  release_tiles();
}

#else  // never called

static void pack(const TilesArgs&, int64_t, int64_t) {}
static void update_blocks(const UpdateArgs&, int64_t, int64_t) {}
static void pack_columns(const ColumnsArgs&, int64_t, int64_t) {}
static void gradients(const GradientArgs&, int64_t, int64_t) {}

#endif

void pack_tiles(const TilesArgs& a, int64_t begin, int64_t end) noexcept {
  pack(a, begin, end);
}

void update_tiles(const UpdateArgs& a, int64_t begin, int64_t end) noexcept {
  update_blocks(a, begin, end);
}

void pack_c_tiles(const ColumnsArgs& a, int64_t begin, int64_t end) noexcept {
  pack_columns(a, begin, end);
}

void gradient_tiles(const GradientArgs& a, int64_t begin, int64_t end) noexcept {
  gradients(a, begin, end);
}

}  // namespace fastweights::lora::FW_LEVEL
