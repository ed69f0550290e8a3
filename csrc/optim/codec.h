// The dynamic 8-bit maps by arithmetic (docs/optim.md). The positive levels are seven decades: decade i = 0..6 holds n
// levels (n = 2^i with signs, 2^(i+1) without) at 10^(i-6) (0.1 + 0.9 (j + 1/2) / n), j < n. Then come 0 and 1.
// A decade is a line, in both directions, and the eighth line serves both 0 and 1.
#pragma once

#include "optim/tables.h"

namespace fastweights::optim::FW_LEVEL {

// Signed codes: 127 + p for a level of position p = 0..128, 127 - p for its opposite. Unsigned codes are positions.
struct Map {
  // level(p) = slope f + base with f = 2p + 1 (signed) or p + 1: a decade is the exponent of f.
  Table level_slope, level_base;
  // position(x) = min(round(slope x + base), last), in the decade found from threshold: the least x of the next one.
  Table threshold, slope, base, last;
  uint8_t zero;
};

constexpr void set_entry(Table& t, int i, double x) {
  t.entries[i] = t.entries[i + 8] = float(x);
}

// With keep_sign, only 0 itself becomes 0: anything else is at least the smallest level.
constexpr Map make_map(bool is_signed, bool keep_sign) {
  Map map{};
  double n = is_signed ? 1 : 2, unit = 1e-6;
  for (int i = 0; i < 7; ++i, n *= 2, unit *= 10) {
    const double first = is_signed ? n : n - 1, spacing = 0.9 * unit / n, start = 0.1 * unit + spacing / 2;
    const double zero_position = start - spacing * first;
    set_entry(map.level_slope, i, is_signed ? spacing / 2 : spacing);
    set_entry(map.level_base, i, zero_position - (is_signed ? spacing / 2 : spacing));
    // A decade of one level, the first of the signed map, is that level from its threshold on, however low this is.
    set_entry(map.slope, i, n == 1 ? 0 : 1 / spacing);
    set_entry(map.base, i, n == 1 ? 1 : -zero_position / spacing);
    set_entry(map.last, i, first + n - 1);
    // Half-way between the last level of the decade before, 0.9 unit spacings of 0.1 n / (n / 2) below, and the first.
    if (i > 0) set_entry(map.threshold, i - 1, 0.1 * unit + 0.2 * spacing);
  }
  const double top = is_signed ? 128 : 255, least = is_signed ? 5.5e-7 : 3.25e-7;
  set_entry(map.level_slope, 7, 1 / (is_signed ? 256.0 : 255.0));
  set_entry(map.level_base, 7, -1 / (is_signed ? 256.0 : 255.0));
  set_entry(map.slope, 7, top);
  set_entry(map.base, 7, 0);
  set_entry(map.last, 7, top);
  set_entry(map.threshold, 6, is_signed ? 1 - 0.225 / 64 : 1 - 0.225 / 128);
  set_entry(map.threshold, 7, keep_sign ? 0x1p-126 : least / 2);
  map.zero = is_signed ? 127 : 0;
  return map;
}

template <bool kSigned>
constexpr Map kMap = make_map(kSigned, false);
template <bool kSigned>
constexpr Map kStateMap = make_map(kSigned, kSigned);

FW_INLINE Ints magnitude_bits(Floats x) {
  return bit_cast<Ints>(x) & 0x7fffffff;
}

FW_INLINE Ints exponent_bits(Floats x) {
  return bit_cast<Ints>(bit_cast<Vec<uint32_t>>(x) >> 23);
}

// The sign of the second argument on the first, which is not negative.
FW_INLINE Floats with_sign(Floats x, Floats sign) {
  return bit_cast<Floats>(bit_cast<Ints>(x) | (bit_cast<Ints>(sign) & int32_t(0x80000000)));
}

template <bool kSigned>
FW_INLINE Floats level_of(const Map& map, Ints code) {
  const Floats c = __builtin_convertvector(code, Floats), p = kSigned ? c - 127.0f : c;
  const Floats f = kSigned ? fma(bit_cast<Floats>(magnitude_bits(p)), set1(2.0f), set1(1.0f)) : p + 1.0f;
  const Ints decade = exponent_bits(f);
  const Floats level = fma(pick(map.level_slope, decade), f, pick(map.level_base, decade));
  return kSigned ? with_sign(level, p) : level;
}

// 1.5 * 2^23: adding it rounds to the nearest integer, which is then in the lowest bits.
constexpr float kRound = 12582912.0f;
constexpr int32_t kRoundBits = 0x4b400000;

// kRoundBits + the position that is nearest to x in [0, 1].
FW_INLINE Ints rounded_position(const Map& map, Floats x) {
  // The bits of a float are a piecewise linear logarithm. Scaled and shifted so that at every threshold of both maps it
  // rounds to the decade below: the guess is right or too low by one, and the threshold says which.
  const Ints bits = bit_cast<Ints>(x), least = bit_cast<Ints>(set1(1e-7f));
  const Floats logarithm = __builtin_convertvector(bits > least ? bits : least, Floats);
  const Ints guess = bit_cast<Ints>(fma(logarithm, set1(0.316f / (1 << 23)), set1(kRound - 34)));
  const Ints decade = x >= pick(map.threshold, guess) ? guess + 1 : guess;
  const Floats position = fma(pick(map.slope, decade), x, pick(map.base, decade));
  return bit_cast<Ints>(min(position, pick(map.last, decade)) + kRound);
}

// The code nearest to x in [-1, 1]; 1 has no opposite.
template <bool kSigned>
FW_INLINE Ints code_of(const Map& map, Floats x) {
  if constexpr (!kSigned) return rounded_position(map, x) & 0xff;
  const Ints p = rounded_position(map, bit_cast<Floats>(magnitude_bits(x)));
  const Ints code = bit_cast<Ints>(x) < 0 ? (kRoundBits + 127) - p : p - (kRoundBits - 127);
  return code > 0 ? code : Ints{};
}

// What x is multiplied with before it is coded. An absmax that is 0, subnormal, infinite or NaN has none.
FW_INLINE float inverse_of(float absmax) {
  return absmax >= 0x1p-126f && absmax <= 0x1.fffffep127f ? 1 / absmax : 0.0f;
}

}  // namespace fastweights::optim::FW_LEVEL
