// Reading the packed weight: where a group lies, its lines as vectors of 32-bit words (one output each), its codes as
// bytes or as numbers, its parameters.
#pragma once

#include "core/vec.h"
#include "quantization/code_books.h"
#include "quantization/kernel.h"

namespace fastweights::quantization::FW_LEVEL {

using Words = Vec<int32_t>;
constexpr int kWords = kLanes<int32_t>;       // outputs per vector
constexpr int kParts = int(kStrip) / kWords;  // vectors per line
constexpr int64_t kAhead = 2048;              // bytes that the software prefetch runs ahead of the loads

template <Format F>
constexpr FormatTraits kTraits = kFormatTraits[int(F)];

// Bits of a code in its lower and in its upper plane.
template <Format F>
constexpr int kUpper = kTraits<F>.bits == 6 ? 2 : kTraits<F>.bits % 2;
template <Format F>
constexpr int kLower = int(kTraits<F>.bits) - kUpper<F>;

// Codes are read in runs of so many quartets, numbered u: the unit in which planes alternate, or a pair of quartets.
template <Format F>
constexpr int kRun = kUpper<F>        ? 8 / kUpper<F>
                     : kLower<F> == 2 ? 4
                                      : 2;

// Quartets that share one activation scale, but in small groups where the format has a choice.
template <Format F>
constexpr int kQuartets = int(block_of(kTraits<F>.group ? kTraits<F>.group : kBlock)) / 4;

template <Format F>
constexpr int64_t kRunBytes = kRun<F> * kTraits<F>.bits * kLine / 8;

// ---- codes -------------------------------------------------------------------------------------------------------

FW_INLINE Words load_words(const uint8_t* line, int part) {
  return load(reinterpret_cast<const int32_t*>(line) + part * kWords);
}

// Logical shift: the bits of neighbours come along.
FW_INLINE Words shift_right(Words w, int bits) {
  return bit_cast<Words>(bit_cast<Vec<uint32_t>>(w) >> bits);
}

// Where a plane of `bits` has quartet u of a run that begins at bit 0 of its first line.
constexpr int64_t plane_line(int bits, int64_t u) {
  return u / (8 / bits) * kLine;
}
constexpr int plane_bit(int bits, int64_t u) {
  return int(u % (8 / bits)) * bits;
}
template <Format F>
constexpr int64_t kUpperPlane = kRun<F> * kLower<F> * kLine / 8;  // where it begins in a run

constexpr int32_t in_every_byte(int bits) {
  return int32_t(0x01010101u * uint32_t(bits));
}

// The codes of quartet u, one in every byte; of a single plane with what the line has above them, which is the bits of
// their neighbours. u is known when this is compiled, and with it the shifts.
template <Format F>
FW_INLINE Words code_words(const uint8_t* run, int u, int part) {
  constexpr int lower = kLower<F>, upper = kUpper<F>;
  const Words low = shift_right(load_words(run + plane_line(lower, u), part), plane_bit(lower, u));
  if constexpr (upper == 0) {
    return low;
  } else {
    const Words line = load_words(run + kUpperPlane<F> + plane_line(upper, u), part);
    const int shift = plane_bit(upper, u) - lower;  // to above the bits of the lower plane
    const Words high = shift < 0 ? line << -shift : shift_right(line, shift);
    return (low & in_every_byte((1 << lower) - 1)) | (high & in_every_byte(((1 << upper) - 1) << lower));
  }
}

// The same as integers that meet int8 activations.
template <Format F>
FW_INLINE Words code_bytes(const uint8_t* run, int u, int part) {
  const Words w = code_words<F>(run, u, part);
  if constexpr (kTraits<F>.levels == Levels::signed_counted) {
    return w;
  } else {
    const Words codes = kUpper<F> ? w : w & in_every_byte((1 << kTraits<F>.bits) - 1);
    if constexpr (kTraits<F>.levels == Levels::book) {
      return look_up_bytes(CodeBook<F>::image, codes);
    } else {
      return codes;
    }
  }
}

// What those integers have to be multiplied by.
template <Format F>
constexpr float image_unit() {
  if constexpr (kTraits<F>.levels == Levels::book) {
    return CodeBook<F>::image_unit;
  } else {
    return 1.0f;
  }
}

// A float of 4 bits of exponent and 3 of mantissa: moved to where a float has them, with the exponents' difference
// added. Numbers below 2^-6 have no implicit one: they get that of 2^-6, which is taken away again.
FW_INLINE Vec<float> widen_e4m3(Words byte) {
  const Words magnitude = (byte & 0x7f) << 20, sign = (byte & 0x80) << 24;
  const Words tiny = magnitude < 0x00800000, nan = magnitude == 0x07f00000;
  const Words bits = magnitude + (nan ? set1(240 << 23) : tiny ? set1(121 << 23) : set1(120 << 23));
  const Vec<float> value = bit_cast<Vec<float>>(bits) - (tiny ? set1(0x1p-6f) : zero<float>());
  return bit_cast<Vec<float>>(bit_cast<Words>(value) | sign);
}

// The level of the code in byte t of every word, in units of level_unit(t). A counted code stays where it is in the
// word, which saves a shift: level_unit puts the power of two right, exactly.
template <Format F>
FW_INLINE Vec<float> level_at(Words w, int t) {
  if constexpr (kTraits<F>.levels == Levels::book) {
    return look_up(CodeBook<F>::levels, w, 8 * t);
  } else if constexpr (kTraits<F>.levels == Levels::signed_counted) {
    return __builtin_convertvector((w << (24 - 8 * t)) >> 24, Vec<float>);
  } else if constexpr (kTraits<F>.levels == Levels::e4m3) {
    return widen_e4m3(shift_right(w, 8 * t));
  } else {
    return __builtin_convertvector(w & (((1 << kTraits<F>.bits) - 1) << (8 * t)), Vec<float>);
  }
}

template <Format F>
constexpr float level_unit(int t) {
  return kTraits<F>.levels == Levels::counted ? 1.0f / float(1 << (8 * t)) : 1.0f;
}

// The code of input k of a group, for what goes output by output.
template <Format F>
FW_INLINE int code_of(const uint8_t* lines, int64_t lane, int64_t k) {
  constexpr int lower = kLower<F>, upper = kUpper<F>;
  const int64_t u = k / 4 % kRun<F>;
  const uint8_t* byte = lines + k / 4 / kRun<F> * kRunBytes<F> + lane * 4 + k % 4;
  const int low = byte[plane_line(lower, u)] >> plane_bit(lower, u) & ((1 << lower) - 1);
  if constexpr (upper == 0) {
    return low;
  } else {
    const int high = byte[kUpperPlane<F> + plane_line(upper, u)] >> plane_bit(upper, u) & ((1 << upper) - 1);
    return low | high << lower;
  }
}

// Its inverse, into lines that were all zeros.
template <Format F>
FW_INLINE void put_code(uint8_t* lines, int64_t lane, int64_t k, int code) {
  constexpr int lower = kLower<F>, upper = kUpper<F>;
  const int64_t u = k / 4 % kRun<F>;
  uint8_t* byte = lines + k / 4 / kRun<F> * kRunBytes<F> + lane * 4 + k % 4;
  byte[plane_line(lower, u)] |= uint8_t((code & ((1 << lower) - 1)) << plane_bit(lower, u));
  if constexpr (upper) byte[kUpperPlane<F> + plane_line(upper, u)] |= uint8_t(code >> lower << plane_bit(upper, u));
}

// With its offset.
template <Format F>
FW_INLINE float level_of(int code) {
  if constexpr (kTraits<F>.levels == Levels::book) {
    return CodeBook<F>::levels[code];
  } else if constexpr (kTraits<F>.levels == Levels::e4m3) {
    return widen_e4m3(set1(code))[0];
  } else {
    return float(kTraits<F>.levels == Levels::signed_counted ? int8_t(code) : code + kTraits<F>.offset);
  }
}

// Pins the order in which accumulators are updated: left alone, compilers gather products or broadcasts first and then
// spill, which costs a third of the speed.
template <typename V>
FW_INLINE void keep_in_register([[maybe_unused]] V& acc) {
#if defined(__x86_64__) && !defined(FW_WIDE)
  asm volatile("" : "+v"(acc));
#endif
}

// ---- groups ------------------------------------------------------------------------------------------------------

template <Format F>
constexpr int64_t kBundle = bundle_of(kTraits<F>.parameter);

template <Format F, typename Byte>
FW_INLINE Byte* lines_of(const Weight& w, Byte* strip, int64_t g) {
  return strip + g / kBundle<F> * w.bundle_bytes + g % kBundle<F> * w.group_bytes;
}

// Those of the whole bundle.
template <Format F, typename Byte>
FW_INLINE Byte* parameters_of(const Weight& w, Byte* strip, int64_t g) {
  return strip + g / kBundle<F> * w.bundle_bytes + kBundle<F> * w.group_bytes;
}

// Where group g of a panel begins among the activations of M rows, for `each` numbers per row and group; the panel goes
// by its first row.
FW_INLINE int64_t panel_offset(int64_t M, int64_t groups, int64_t panel, int64_t g, int64_t each) {
  const int64_t block = panel / kRowBlock * kRowBlock, rows = M - block < kRowBlock ? M - block : kRowBlock;
  return (block * groups + g * rows + panel - block) * each;
}

struct Parameters {
  Vec<float> scale[kParts], minimum[kParts];
};

// 2^(e - 127): e becomes the exponent of a float, but for 0, which is half of the smallest normal one.
FW_INLINE Vec<float> power_of_two(Words e) {
  return bit_cast<Vec<float>>(e == 0 ? set1(int32_t(0x00400000)) : e << 23);
}

// A vector out of row r of numbers that begin at p.
FW_INLINE Vec<float> float16_row(const uint8_t* p, int64_t r, int part) {
  return load_as(reinterpret_cast<const float16*>(p) + r * kStrip + part * kWords);
}
template <typename Byte>
FW_INLINE Words byte_row(const uint8_t* p, int64_t r, int part) {
  using Bytes = typename VecOf<Byte, kWords>::unaligned;
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p + r * kStrip + part * kWords), Words);
}

// Scale and minimum number j of llama.cpp's 12 bytes: the first four of both are whole, the others have their upper two
// bits above those.
struct SixBits {
  Words scale, minimum;
};
FW_INLINE SixBits six_bits(const uint8_t* p, int64_t j, int part) {
  const auto row = [&](int64_t r) __attribute__((always_inline)) { return byte_row<uint8_t>(p, r, part); };
  if (j < 4) return {row(j) & 63, row(j + 4) & 63};
  return {(row(j + 4) & 15) | (row(j - 4) >> 6 << 4), row(j + 4) >> 4 | (row(j) >> 6 << 4)};
}

// What the formats with a choice of parameters store.
FW_INLINE void load_scale_minimum(Parameter kind, const uint8_t* p, int part, Vec<float>* scale, Vec<float>* minimum) {
  if (kind == Parameter::scale_zero_f32) {
    const float* rows = reinterpret_cast<const float*>(p) + part * kWords;
    *scale = load(rows);
    *minimum = -*scale * load(rows + kStrip);
  } else {
    *scale = float16_row(p, 0, part);
    const Vec<float> second = float16_row(p, 1, part);
    *minimum = kind == Parameter::scale_zero ? -*scale * second : second;
  }
}

template <Format F>
FW_INLINE Parameters load_parameters(const Weight& w, const uint8_t* strip, int64_t g) {
  constexpr Parameter kind = kTraits<F>.parameter;
  const uint8_t* p = parameters_of<F>(w, strip, g);
  const int64_t j = g % kBundle<F>;
  Parameters out;
  FW_UNROLL
  for (int i = 0; i < kParts; ++i) {
    Vec<float>&scale = out.scale[i], &minimum = out.minimum[i];
    if constexpr (kind == Parameter::scale_minimum) {
      load_scale_minimum(w.parameter, p, i, &scale, &minimum);
    } else if constexpr (kind == Parameter::scale_f32) {
      scale = load(reinterpret_cast<const float*>(p) + i * kWords);
    } else if constexpr (kind == Parameter::scale_e8m0) {
      scale = power_of_two(byte_row<uint8_t>(p, j, i));
    } else if constexpr (kind == Parameter::q4_k) {
      const SixBits six = six_bits(p + kLine, j, i);
      scale = float16_row(p, 0, i) * __builtin_convertvector(six.scale, Vec<float>);
      minimum = -float16_row(p, 1, i) * __builtin_convertvector(six.minimum, Vec<float>);
    } else if constexpr (kind == Parameter::q6_k) {
      scale = float16_row(p, 0, i) * __builtin_convertvector(byte_row<int8_t>(p + 2 * kStrip, j, i), Vec<float>);
    } else {
      scale = float16_row(p, j, i);
    }
    if constexpr (kind != Parameter::scale_minimum && kind != Parameter::q4_k) {
      minimum = kTraits<F>.offset ? scale * float(kTraits<F>.offset) : zero<float>();
    }
  }
  return out;
}

// ---- formats as types --------------------------------------------------------------------------------------------

template <Format F>
struct FormatTag {};

// f(FormatTag<format>{})
template <typename Function>
FW_INLINE auto with_format(Format format, const Function& f) {
  switch (format) {
    case Format::int8:
      return f(FormatTag<Format::int8>{});
    case Format::nf4:
      return f(FormatTag<Format::nf4>{});
    case Format::fp4:
      return f(FormatTag<Format::fp4>{});
    case Format::iq4_nl:
      return f(FormatTag<Format::iq4_nl>{});
    case Format::mxfp4:
      return f(FormatTag<Format::mxfp4>{});
    case Format::int2:
      return f(FormatTag<Format::int2>{});
    case Format::int3:
      return f(FormatTag<Format::int3>{});
    case Format::int5:
      return f(FormatTag<Format::int5>{});
    case Format::int6:
      return f(FormatTag<Format::int6>{});
    case Format::int4_sym:
      return f(FormatTag<Format::int4_sym>{});
    case Format::int8_sym:
      return f(FormatTag<Format::int8_sym>{});
    case Format::q4_k:
      return f(FormatTag<Format::q4_k>{});
    case Format::q6_k:
      return f(FormatTag<Format::q6_k>{});
    case Format::fp8_e4m3:
      return f(FormatTag<Format::fp8_e4m3>{});
    default:
      return f(FormatTag<Format::int4>{});
  }
}

}  // namespace fastweights::quantization::FW_LEVEL
