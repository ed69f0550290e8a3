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
constexpr int kQuartets = int(kBlock) / 4;    // of a block

template <Format F>
constexpr FormatTraits kTraits = kFormatTraits[int(F)];

// Quartets per line.
template <Format F>
constexpr int kPerLine = int(8 / kTraits<F>.bits);

// Codes are read in runs of so many quartets, numbered u: known when this is compiled, and with it the shifts.
template <Format F>
constexpr int kRun = kPerLine<F> > 2 ? kPerLine<F> : 2;

template <Format F>
constexpr int64_t kRunBytes = kRun<F> / kPerLine<F> * kLine;

// ---- codes -------------------------------------------------------------------------------------------------------

FW_INLINE Words load_words(const uint8_t* line, int part) {
  return load(reinterpret_cast<const int32_t*>(line) + part * kWords);
}

// Logical shift: the bits of neighbours come along.
FW_INLINE Words shift_right(Words w, int bits) {
  return bit_cast<Words>(bit_cast<Vec<uint32_t>>(w) >> bits);
}

// The codes of a quartet of a run, one in every byte, above it what there is of its neighbours in the line.
template <Format F>
FW_INLINE Words code_words(const uint8_t* run, int u, int part) {
  const Words line = load_words(run + u / kPerLine<F> * kLine, part);
  return shift_right(line, int(kTraits<F>.bits) * (u % kPerLine<F>));
}

// The same as integers that meet int8 activations.
template <Format F>
FW_INLINE Words code_bytes(const uint8_t* run, int u, int part) {
  const Words w = code_words<F>(run, u, part);
  if constexpr (kTraits<F>.levels == Levels::signed_counted) {
    return w;
  } else {
    const Words codes = w & (0x01010101 * ((1 << kTraits<F>.bits) - 1));
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

// The level of the code in byte t of every word, in units of level_unit(t). A counted code stays where it is in the
// word, which saves a shift: level_unit puts the power of two right, exactly.
template <Format F>
FW_INLINE Vec<float> level_at(Words w, int t) {
  if constexpr (kTraits<F>.levels == Levels::book) {
    return look_up(CodeBook<F>::levels, w, 8 * t);
  } else if constexpr (kTraits<F>.levels == Levels::signed_counted) {
    return __builtin_convertvector((w << (24 - 8 * t)) >> 24, Vec<float>);
  } else {
    return __builtin_convertvector(w & (((1 << kTraits<F>.bits) - 1) << (8 * t)), Vec<float>);
  }
}

template <Format F>
constexpr float level_unit(int t) {
  return kTraits<F>.levels == Levels::counted ? 1.0f / float(1 << (8 * t)) : 1.0f;
}

// One code, for what goes output by output.
template <Format F>
FW_INLINE int code_of(const uint8_t* group, int64_t lane, int64_t k) {
  constexpr int bits = int(kTraits<F>.bits);
  const int64_t q = k / 4;
  return group[q / kPerLine<F> * kLine + lane * 4 + k % 4] >> (bits * (q % kPerLine<F>)) & ((1 << bits) - 1);
}

template <Format F>
FW_INLINE float level_of(int code) {
  if constexpr (kTraits<F>.levels == Levels::book) {
    return CodeBook<F>::levels[code];
  } else {
    return float(kTraits<F>.levels == Levels::signed_counted ? int8_t(code) : code);
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

template <Format F, typename Byte>
FW_INLINE Byte* lines_of(const Weight& w, Byte* strip, int64_t g) {
  constexpr int64_t bundle = bundle_of(kTraits<F>.parameter);
  return strip + g / bundle * w.bundle_bytes + g % bundle * w.group_bytes;
}

template <Format F, typename Byte>
FW_INLINE Byte* parameters_of(const Weight& w, Byte* strip, int64_t g) {
  constexpr int64_t each = parameter_bytes(kTraits<F>.parameter), bundle = bundle_of(kTraits<F>.parameter);
  return strip + g / bundle * w.bundle_bytes + bundle * w.group_bytes + g % bundle * each;
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

template <Format F>
FW_INLINE Parameters load_parameters(const Weight& w, const uint8_t* strip, int64_t g) {
  constexpr Parameter kind = kTraits<F>.parameter;
  const uint8_t* p = parameters_of<F>(w, strip, g);
  const float16* h = reinterpret_cast<const float16*>(p);
  using Bytes = typename VecOf<uint8_t, kWords>::unaligned;
  Parameters out;
  FW_UNROLL
  for (int i = 0; i < kParts; ++i) {
    if constexpr (kind == Parameter::scale_f32) {
      out.scale[i] = load(reinterpret_cast<const float*>(p) + i * kWords);
    } else if constexpr (kind == Parameter::scale_e8m0) {
      out.scale[i] = power_of_two(__builtin_convertvector(*reinterpret_cast<const Bytes*>(p + i * kWords), Words));
    } else {
      out.scale[i] = load_as(h + i * kWords);
    }
    out.minimum[i] = kind == Parameter::scale_minimum ? load_as(h + kStrip + i * kWords) : zero<float>();
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
    default:
      return f(FormatTag<Format::int4>{});
  }
}

}  // namespace fastweights::quantization::FW_LEVEL
