// Products of bfloat16 in the tile registers of AMX. A tile has 16 rows of 64 bytes; an instruction adds to a tile of
// 16 x 16 float sums the product of 16 rows of 32 numbers and 16 rows of 16 pairs of numbers:
//   sums[r][c] += sum over p < 16 of a[r][2p] b[p][2c] + a[r][2p + 1] b[p][2c + 1]
// Tiles lie one after another in memory. Only where has_bf16_tiles() says so.
#pragma once

#include "core/product.h"

namespace fastweights::FW_LEVEL {

constexpr int64_t kSide = 16;             // rows of a tile, 32-bit words of a row
constexpr int64_t kTile = kSide * kSide;  // words of a tile

#if defined(__AVX512BF16__) && defined(__x86_64__)

#define FW_TILES __attribute__((target("amx-tile,amx-bf16")))

FW_TILES static void configure_tiles() {
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

FW_TILES static void release_tiles() {
  _tile_release();
}

// Where a block of tiles finds one operand: words to its second tile, and to the next terms.
struct TileRows {
  const uint32_t* first;
  int64_t second, next;
};

enum class Sums { begin, go_on };

// R tiles of `a` by C of `b` (1 or 2 each): the sums over `terms` tiles, which begin at zero or go on. Those of a's
// second tile are `down` floats further, those of b's second one `right`.
template <int R, int C>
FW_TILES static __attribute__((noinline)) void tile_block(TileRows a, TileRows b, int64_t terms, Sums from, float* sums,
                                                          int64_t down, int64_t right) {
  constexpr int64_t bytes = 4 * kSide;
  asm volatile("" ::: "memory");  // tile loads do not say that they read memory
  if (from == Sums::begin) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, bytes);
    if constexpr (C == 2) _tile_loadd(1, sums + right, bytes);
    if constexpr (R == 2) _tile_loadd(2, sums + down, bytes);
    if constexpr (R == 2 && C == 2) _tile_loadd(3, sums + down + right, bytes);
  }
  for (int64_t k = 0; k < terms; ++k, a.first += a.next, b.first += b.next) {
    _tile_loadd(4, a.first, bytes);
    _tile_loadd(6, b.first, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R == 2) {
      _tile_loadd(5, a.first + a.second, bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (C == 2) {
      _tile_loadd(7, b.first + b.second, bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (R == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, bytes);
  if constexpr (C == 2) _tile_stored(1, sums + right, bytes);
  if constexpr (R == 2) _tile_stored(2, sums + down, bytes);
  if constexpr (R == 2 && C == 2) _tile_stored(3, sums + down + right, bytes);
  asm volatile("" ::: "memory");
}

// tile_block with R and C as there are tiles left.
FW_INLINE void tile_block(int64_t R, int64_t C, TileRows a, TileRows b, int64_t terms, Sums from, float* sums,
                          int64_t down, int64_t right) {
  if (R >= 2 && C >= 2) return tile_block<2, 2>(a, b, terms, from, sums, down, right);
  if (R >= 2) return tile_block<2, 1>(a, b, terms, from, sums, down, right);
  if (C >= 2) return tile_block<1, 2>(a, b, terms, from, sums, down, right);
  tile_block<1, 1>(a, b, terms, from, sums, down, right);
}

// 16 rows of up to 16 words, read as floats, transposed: f(i) gives row i.
template <typename Row>
FW_INLINE void transpose_tile(const Row& row, uint32_t* out) {
  Vec<float> r[kSide];
  FW_UNROLL
  for (int i = 0; i < int(kSide); ++i) r[i] = row(i);
  transpose<float>(r);
  FW_UNROLL
  for (int i = 0; i < int(kSide); ++i) store(reinterpret_cast<float*>(out) + i * kSide, r[i]);
}

#endif

}  // namespace fastweights::FW_LEVEL
