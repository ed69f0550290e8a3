// The formats of a quantized weight, as the torch side and the kernels both need them.
#pragma once

#include <stdint.h>

namespace fastweights::quantization {

enum class Format : int {
  int4,
  int8,
  nf4,
  fp4,
  iq4_nl,
  mxfp4,
  int2,
  int3,
  int5,
  int6,
  int4_sym,
  int8_sym,
  q4_k,
  q6_k,
  fp8_e4m3,
};

constexpr int64_t kStrip = 16;  // outputs per strip
constexpr int64_t kLine = 64;   // bytes of a line
constexpr int64_t kBlock = 32;  // inputs that share one activation scale, or the group where that is less

// What a code stands for, in units of its group's scale.
enum class Levels : int { counted, signed_counted, book, e4m3 };

// The parameters of a bundle of groups, in rows of 16: one number per output.
enum class Parameter : int {
  scale_minimum,   // float16 scales, then float16 minima
  scale_zero,      // float16 scales, then float16 zero points: minimum -scale * zero
  scale_zero_f32,  // the same in float32
  scale_f16,
  scale_f32,
  scale_e8m0,  // powers of two: the byte e is 2^(e - 127), 255 is NaN
  q4_k,  // float16 d, float16 dmin, 12 bytes with 8 scales and 8 minima of 6 bits: scale d * sc, minimum -dmin * m
  q6_k,  // float16 d, 16 signed bytes: scale d * sc
};

struct FormatTraits {
  int64_t bits;  // of a code
  Levels levels;
  int offset;  // added to a counted code: the minimum is offset * scale
  Parameter parameter;
  int64_t group;  // the only group size, or 0 for any multiple of 32
};

// Where a format says scale_minimum, a weight may have either kind of zero points instead.

// In the order of Format.
constexpr FormatTraits kFormatTraits[] = {
    {4, Levels::counted, 0, Parameter::scale_minimum, 0},         // int4: 0..15
    {8, Levels::signed_counted, 0, Parameter::scale_minimum, 0},  // int8: -127..127
    {4, Levels::book, 0, Parameter::scale_f32, 0},                // nf4
    {4, Levels::book, 0, Parameter::scale_f32, 0},                // fp4
    {4, Levels::book, 0, Parameter::scale_f16, 0},                // iq4_nl
    {4, Levels::book, 0, Parameter::scale_e8m0, 32},              // mxfp4
    {2, Levels::counted, 0, Parameter::scale_minimum, 0},         // int2: 0..3
    {3, Levels::counted, 0, Parameter::scale_minimum, 0},         // int3: 0..7
    {5, Levels::counted, 0, Parameter::scale_minimum, 0},         // int5: 0..31
    {6, Levels::counted, 0, Parameter::scale_minimum, 0},         // int6: 0..63
    {4, Levels::counted, -8, Parameter::scale_f16, 0},            // int4_sym: -8..7
    {8, Levels::signed_counted, 0, Parameter::scale_f16, 0},      // int8_sym: -127..127
    {4, Levels::counted, 0, Parameter::q4_k, 32},                 // q4_k: 0..15
    {6, Levels::counted, -32, Parameter::q6_k, 16},               // q6_k: -32..31
    {8, Levels::e4m3, 0, Parameter::scale_f32, 0},                // fp8_e4m3
};

// Groups of a bundle.
static constexpr int64_t bundle_of(Parameter p) {
  switch (p) {
    case Parameter::scale_f16:
      return 2;
    case Parameter::scale_e8m0:
      return 4;
    case Parameter::q4_k:
      return 8;
    case Parameter::q6_k:
      return 16;
    default:
      return 1;
  }
}

// Bytes of the parameters of a bundle, whole lines.
static constexpr int64_t parameter_bytes(Parameter p) {
  switch (p) {
    case Parameter::scale_zero_f32:
      return 2 * kLine;
    case Parameter::q4_k:
      return 4 * kLine;
    case Parameter::q6_k:
      return 5 * kLine;
    default:
      return kLine;
  }
}

static constexpr int64_t block_of(int64_t group) {
  return group < kBlock ? group : kBlock;
}

static constexpr bool takes_int8(Format f) {
  return kFormatTraits[int(f)].levels != Levels::e4m3;
}

// Groups of kSmallGroup inputs too, which a plane of 1 bit is too coarse for.
constexpr int64_t kSmallGroup = 16;
static constexpr bool takes_small_groups(Format f) {
  const FormatTraits& t = kFormatTraits[int(f)];
  return t.parameter == Parameter::scale_minimum && t.bits % 2 == 0;
}

}  // namespace fastweights::quantization
