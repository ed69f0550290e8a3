// quantize, dequantize, dequantize_rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "core/cpu_level.h"
#include "core/parallel.h"
#include "quantization/ops_weight.h"

namespace fastweights::quantization {
namespace {

Tensor quantize_op(const Tensor& w, const std::string& format, int64_t group_size) {
  constexpr const char* op = "quantize";
  check_cpu(op, "w", w);
  check_floating(op, "w", w);
  check_rank(op, "w", w, 2, "[N, K]");
  Weight weight = weight_layout(op, format, w.size(0), w.size(1), group_size);
  const Tensor source = with_contiguous_last(w);
  Tensor packed = torch::stable::new_empty(w, {weight.strips, weight.strip_bytes}, ScalarType::Byte);
  uint8_t* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const QuantizeArgs args{weight, element_of(w.scalar_type()), source.const_data_ptr(), source.stride(0), out};
  parallel_tasks(weight.strips, 100.0 * double(kStrip * weight.K),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(quantize)(args, begin, end); });
  weight.packed = out;
  check_finite(op, stores_float16(weight) ? "finite w within the range of float16" : "finite w", weight);
  return packed;
}

Tensor dequantize_into(const Weight& weight, const int64_t* index, int64_t rows, Tensor out) {
  const DequantizeArgs args{weight, index, rows, element_of(out.scalar_type()), out.mutable_data_ptr()};
  parallel_tasks((rows + kStrip - 1) / kStrip, 10.0 * double(kStrip * weight.K),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(dequantize)(args, begin, end); });
  return out;
}

Tensor dequantize_op(const Tensor& packed, const std::string& format, int64_t out_features, int64_t in_features,
                     int64_t group_size, ScalarType dtype) {
  constexpr const char* op = "dequantize";
  const PackedWeight weight = weight_of(op, packed, format, out_features, in_features, group_size);
  check(is_floating(dtype), op, "expected dtype float32, bfloat16, float16 or float64, got ", dtype_name(dtype));
  check_finite(op, "packed with finite parameters", weight);
  return dequantize_into(weight, nullptr, weight.N, torch::stable::new_empty(packed, {weight.N, weight.K}, dtype));
}

Tensor dequantize_rows_op(const Tensor& packed, const Tensor& index, const std::string& format, int64_t out_features,
                          int64_t in_features, int64_t group_size, ScalarType dtype) {
  constexpr const char* op = "dequantize_rows";
  const PackedWeight weight = weight_of(op, packed, format, out_features, in_features, group_size);
  check(is_floating(dtype), op, "expected dtype float32, bfloat16, float16 or float64, got ", dtype_name(dtype));
  check_cpu(op, "index", index);
  check_dtype(op, "index", index, ScalarType::Long, "");
  const Tensor ids = torch::stable::contiguous(index);
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < ids.numel(); ++i) {
    check(id[i] >= 0 && id[i] < weight.N, op, "expected 0 <= index < ", weight.N, ", got ", id[i]);
  }
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(weight.K);
  return dequantize_into(weight, id, ids.numel(), torch::stable::new_empty(packed, sizes, dtype));
}

}  // namespace
}  // namespace fastweights::quantization

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def("quantize(Tensor w, str format, int group_size) -> Tensor");
  m.def(
      "dequantize(Tensor packed, str format, int out_features, int in_features, int group_size, ScalarType dtype) -> "
      "Tensor");
  m.def(
      "dequantize_rows(Tensor packed, Tensor index, str format, int out_features, int in_features, int group_size, "
      "ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  using namespace fastweights::quantization;
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("dequantize", TORCH_BOX(&dequantize_op));
  m.impl("dequantize_rows", TORCH_BOX(&dequantize_rows_op));
}
