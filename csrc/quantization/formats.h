// The formats of a quantized weight, as the torch side and the kernels both need them.
#pragma once

#include <stdint.h>

namespace fastweights::quantization {

enum class Format : int { int4, int8, nf4, fp4, iq4_nl, mxfp4 };

constexpr int64_t kStrip = 16;  // outputs per strip
constexpr int64_t kLine = 64;   // bytes of a line
constexpr int64_t kBlock = 32;  // inputs whose codes lie together, and that share one activation scale

// What a code stands for, in units of its group's scale.
enum class Levels : int { counted, signed_counted, book };

// The parameters of a group, in rows of 16: one number per output.
enum class Parameter : int {
  scale_minimum,  // float16 scales, then float16 minima
  scale_f16,
  scale_f32,
  scale_e8m0,  // powers of two: the byte e is 2^(e - 127), 255 is NaN
};

struct FormatTraits {
  int64_t bits;  // of a code
  Levels levels;
  Parameter parameter;
  int64_t group;  // the only group size, or 0 for any multiple of kBlock
};

// In the order of Format.
constexpr FormatTraits kFormatTraits[] = {
    {4, Levels::counted, Parameter::scale_minimum, 0},         // int4: 0..15
    {8, Levels::signed_counted, Parameter::scale_minimum, 0},  // int8: -127..127
    {4, Levels::book, Parameter::scale_f32, 0},                // nf4
    {4, Levels::book, Parameter::scale_f32, 0},                // fp4
    {4, Levels::book, Parameter::scale_f16, 0},                // iq4_nl
    {4, Levels::book, Parameter::scale_e8m0, kBlock},          // mxfp4
};

static constexpr int64_t parameter_bytes(Parameter p) {
  return p == Parameter::scale_e8m0 ? kStrip : p == Parameter::scale_f16 ? 2 * kStrip : 4 * kStrip;
}

// Groups whose parameters fill a line.
static constexpr int64_t bundle_of(Parameter p) {
  return kLine / parameter_bytes(p);
}

}  // namespace fastweights::quantization
