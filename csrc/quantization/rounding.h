// The level nearest to a number, and its code, format by format.
#pragma once

#include "quantization/line.h"

namespace fastweights::quantization::FW_LEVEL {

using Floats = Vec<float>;

// The levels that are written, with their offset. extreme: what the weight of largest magnitude becomes where a group
// has no minimum.
struct Range {
  float lowest, highest, extreme;
};

template <Format F>
constexpr Range range_of() {
  constexpr FormatTraits t = kTraits<F>;
  if constexpr (F == Format::iq4_nl) {
    return {-127, 113, -127};
  } else if constexpr (t.levels == Levels::book) {
    return {-1, 1, 1};
  } else if constexpr (t.levels == Levels::e4m3) {
    return {-448, 448, 448};
  } else if constexpr (t.levels == Levels::signed_counted) {
    return {-127, 127, 127};
  } else {
    return {float(t.offset), float(t.offset + (1 << t.bits) - 1), float(t.offset)};
  }
}

FW_INLINE Floats round_nearest(Floats v) {
  return (v + 12582912.0f) - 12582912.0f;
}

template <Format F>
FW_INLINE Floats nearest_level(Floats x) {
  if constexpr (kTraits<F>.levels == Levels::book) {
    using Book = CodeBook<F>;
    Floats level = set1(Book::levels[Book::order[0]]);
    FW_UNROLL
    for (int i = 0; i < 15; ++i) level = x > threshold<F>(i) ? set1(Book::levels[Book::order[i + 1]]) : level;
    return level;
  } else {
    return round_nearest(min(max(x, set1(range_of<F>().lowest)), set1(range_of<F>().highest)));
  }
}

// Halfway goes to the even mantissa. A number below 2^-6 is a multiple of 2^-9, which counts its code.
FW_INLINE Words nearest_e4m3(Floats x) {
  const Words sign = (bit_cast<Words>(x) >> 24) & 0x80;
  const Floats a = min(x < 0.0f ? -x : x, set1(448.0f));
  const Words bits = bit_cast<Words>(a);
  const Words normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  const Words tiny = __builtin_convertvector(round_nearest(a * 512.0f), Words);
  return (a < 0x1p-6f ? tiny : normal) | sign;
}

template <Format F>
FW_INLINE Words nearest_code(Floats x) {
  if constexpr (kTraits<F>.levels == Levels::book) {
    using Book = CodeBook<F>;
    Words code = set1(Book::order[0]);
    FW_UNROLL
    for (int i = 0; i < 15; ++i) code = x > threshold<F>(i) ? set1(Book::order[i + 1]) : code;
    return code;
  } else if constexpr (kTraits<F>.levels == Levels::e4m3) {
    return nearest_e4m3(x);
  } else {
    return __builtin_convertvector(nearest_level<F>(x), Words) - kTraits<F>.offset;
  }
}

}  // namespace fastweights::quantization::FW_LEVEL
