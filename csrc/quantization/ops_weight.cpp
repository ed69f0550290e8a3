#include "quantization/ops_weight.h"

#include <vector>

namespace fastweights::quantization {

Weight weight_layout(const char* op, const std::string& format, int64_t out_features, int64_t in_features,
                     int64_t group_size) {
  constexpr int64_t kMost = int64_t(1) << 31;  // keeps every product below from overflowing
  check(format == "int4" || format == "int8", op, "expected format int4 or int8, got '", format, "'");
  check(group_size > 0 && group_size % kBlock == 0 && group_size <= 1 << 16, op,
        "expected group_size a positive multiple of ", kBlock, " up to 65536, got ", group_size);
  check(out_features >= 0 && out_features < kMost, op, "expected 0 <= out_features < 2^31, got ", out_features);
  check(in_features >= 0 && in_features < kMost, op, "expected 0 <= in_features < 2^31, got ", in_features);
  Weight w{};
  w.format = format == "int4" ? Format::int4 : Format::int8;
  w.N = out_features;
  w.K = in_features;
  w.group = group_size;
  w.strips = (out_features + kStrip - 1) / kStrip;
  w.groups = (in_features + group_size - 1) / group_size;
  w.group_bytes = group_size / (w.format == Format::int4 ? 8 : 4) * kLine + kLine;
  w.strip_bytes = w.groups * w.group_bytes;
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

void check_finite(const char* op, const char* what, const Weight& w) {
  for (int64_t i = 0; i < w.strips * w.groups; ++i) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(w.packed + (i + 1) * w.group_bytes - kLine);
    for (int64_t j = 0; j < 2 * kStrip; ++j) {
      check((p[j] & 0x7c00) != 0x7c00, op, "expected ", what, ", got an infinite or NaN scale or minimum in outputs ",
            i / w.groups * kStrip, " to ", (i / w.groups + 1) * kStrip - 1);
    }
  }
}

Rows rows_of(const Tensor& t) {
  const auto rows_in_place = [&] {
    const int64_t d = t.dim();
    if (d == 0 || (t.size(d - 1) > 1 && t.stride(d - 1) != 1)) return false;
    for (int64_t i = 0; i + 2 < d; ++i) {
      if (t.size(i) != 1 && t.stride(i) != t.size(i + 1) * t.stride(i + 1)) return false;
    }
    return true;
  };
  const Tensor owner = rows_in_place() ? t : torch::stable::contiguous(t);
  const int64_t d = owner.dim(), width = owner.size(d - 1);
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < d; ++i) count *= owner.size(i);
  return {owner, owner.const_data_ptr(), count, d > 1 ? owner.stride(d - 2) : width};
}

Tensor new_rows(const Tensor& t, int64_t width) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = width;
  return torch::stable::new_empty(t, sizes);
}

}  // namespace fastweights::quantization
