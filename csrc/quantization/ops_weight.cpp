#include "quantization/ops_weight.h"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace fastweights::quantization {
namespace {

// In the order of Format.
constexpr const char* kNames[] = {"int4", "int8", "nf4",      "fp4",      "iq4_nl", "mxfp4", "int2",    "int3",
                                  "int5", "int6", "int4_sym", "int8_sym", "q4_k",   "q6_k",  "fp8_e4m3"};
static_assert(std::size(kNames) == std::size(kFormatTraits));

// Sets format and parameter.
void set_format(const char* op, const std::string& name, Weight& w) {
  std::string known;
  for (size_t i = 0; i < std::size(kNames); ++i) {
    const std::string base = kNames[i];
    const Parameter parameter = kFormatTraits[i].parameter;
    w.format = Format(i);
    w.parameter = parameter;
    if (name == base) return;
    if (parameter == Parameter::scale_minimum && (name == base + "_zp" || name == base + "_zp32")) {
      w.parameter = name == base + "_zp" ? Parameter::scale_zero : Parameter::scale_zero_f32;
      return;
    }
    known += base + ", ";
  }
  check(false, op, "expected format in ", known, "int2_zp to int8_zp, int2_zp32 to int8_zp32, got '", name, "'");
}

// The numbers of a bundle's parameters that could be otherwise.
bool is_finite(Parameter kind, const uint8_t* p) {
  if (kind == Parameter::scale_e8m0) return std::find(p, p + kLine, 255) == p + kLine;
  if (kind == Parameter::scale_f32 || kind == Parameter::scale_zero_f32) {
    const float* rows = reinterpret_cast<const float*>(p);
    return std::all_of(rows, rows + (kind == Parameter::scale_f32 ? 1 : 2) * kStrip,
                       [](float x) { return std::isfinite(x); });
  }
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
  const int64_t rows = kind == Parameter::q6_k ? 1 : 2;
  return std::all_of(halves, halves + rows * kStrip, [](uint16_t x) { return (x & 0x7c00) != 0x7c00; });
}

}  // namespace

const char* format_name(Format format) {
  return kNames[int(format)];
}

Weight weight_layout(const char* op, const std::string& format, int64_t out_features, int64_t in_features,
                     int64_t group_size) {
  constexpr int64_t kMost = int64_t(1) << 31;  // keeps every product below from overflowing
  Weight w{};
  set_format(op, format, w);
  const FormatTraits& traits = kFormatTraits[int(w.format)];
  check(traits.group == 0 || group_size == traits.group, op, "expected group_size ", traits.group, " for format ",
        format, ", got ", group_size);
  const bool small = group_size == kSmallGroup && takes_small_groups(w.format);
  check(traits.group || small || (group_size > 0 && group_size % kBlock == 0 && group_size <= 1 << 16), op,
        "expected group_size a positive multiple of ", kBlock, " up to 65536, got ", group_size);
  check(out_features >= 0 && out_features < kMost, op, "expected 0 <= out_features < 2^31, got ", out_features);
  check(in_features >= 0 && in_features < kMost, op, "expected 0 <= in_features < 2^31, got ", in_features);
  w.N = out_features;
  w.K = in_features;
  w.group = group_size;
  w.strips = (out_features + kStrip - 1) / kStrip;
  w.groups = (in_features + group_size - 1) / group_size;
  const int64_t bundle = bundle_of(w.parameter);
  w.group_bytes = group_size * kStrip * traits.bits / 8;
  w.bundle_bytes = bundle * w.group_bytes + parameter_bytes(w.parameter);
  w.strip_bytes = (w.groups + bundle - 1) / bundle * w.bundle_bytes;
  return w;
}

PackedWeight weight_of(const char* op, const Tensor& packed, const std::string& format, int64_t out_features,
                       int64_t in_features, int64_t group_size) {
  PackedWeight w{weight_layout(op, format, out_features, in_features, group_size), {}};
  check_cpu(op, "packed", packed);
  check_dtype(op, "packed", packed, ScalarType::Byte, "");
  check_shape(op, "packed", packed, {w.strips, w.strip_bytes}, "[strips, bytes]",
              "out_features, in_features and group_size");
  w.owner = torch::stable::contiguous(packed);
  w.packed = static_cast<const uint8_t*>(w.owner.const_data_ptr());
  return w;
}

bool stores_float16(const Weight& w) {
  return w.parameter != Parameter::scale_f32 && w.parameter != Parameter::scale_zero_f32 &&
         w.parameter != Parameter::scale_e8m0;
}

void check_finite(const char* op, const char* what, const Weight& w) {
  const int64_t bundles = w.strip_bytes / w.bundle_bytes;
  for (int64_t i = 0; i < w.strips * bundles; ++i) {
    check(is_finite(w.parameter, w.packed + (i + 1) * w.bundle_bytes - parameter_bytes(w.parameter)), op, "expected ",
          what, ", got an infinite or NaN scale, minimum or zero point in outputs ", i / bundles * kStrip, " to ",
          (i / bundles + 1) * kStrip - 1);
  }
}

}  // namespace fastweights::quantization
