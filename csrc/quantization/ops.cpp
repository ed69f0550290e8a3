// quantized_linear and its backward to the input.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "core/bf16_tiles.h"
#include "core/cpu_level.h"
#include "core/matrix_rows.h"
#include "core/parallel.h"
#include "quantization/ops_activations.h"
#include "quantization/ops_weight.h"

namespace fastweights::quantization {
namespace {

bool activation_quantized(const char* op, const std::string& activation) {
  check(activation == "int8" || activation == "float", op, "expected activation int8 or float, got '", activation, "'");
  return activation == "int8";
}

// x as bfloat16 in tiles, and the product: see matmul_tiles.cpp.
void multiply_tiles(MatmulArgs args, const Tensor& x, const MatrixRows& rows) {
  const Weight& w = args.weight;
  const int64_t row_tiles = (args.M + 15) / 16, input_tiles = (w.groups * w.group + 31) / 32;
  const Tensor packed = torch::stable::new_empty(x, {row_tiles * 16, input_tiles * 32});
  args.x.values = packed.mutable_data_ptr();
  const ActivationArgs source{args.element,           rows.data, rows.stride, args.M, w.K, w.group, w.groups,
                              {nullptr, 0.0f, false}, args.x};
  parallel_tasks(row_tiles, 64.0 * double(w.K),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(pack_tiles)(source, begin, end); });
  const int64_t blocks = (args.M + kTileRows - 1) / kTileRows, pairs = (w.strips + 1) / 2;
  parallel_tasks(blocks * pairs, 4.0 * double(std::min(args.M, kTileRows) * kStrip * w.K),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(matmul_tiles)(args, begin, end); });
}

Tensor quantized_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                        const std::string& format, int64_t out_features, int64_t in_features, int64_t group_size,
                        const std::string& activation) {
  constexpr const char* op = "quantized_linear";
  const PackedWeight w = weight_of(op, packed, format, out_features, in_features, group_size);
  const bool quantized = activation_quantized(op, activation);
  check_cpu(op, "x", x);
  check_floating(op, "x", x);
  check(x.dim() >= 1 && x.size(x.dim() - 1) == w.K, op, "expected x of shape [..., in_features] = [..., ", w.K,
        "], got ", shape_of(x));
  const Element element = element_of(x.scalar_type());
  const MatrixRows rows = matrix_rows_of(x);
  const int64_t M = rows.count;
  Tensor y = new_rows(x, w.N);

  MatmulArgs args{};
  args.weight = w;
  args.M = M;
  args.element = element;
  args.y = y.mutable_data_ptr();
  args.y_stride = w.N;
  Tensor bias_owner;
  if (bias) {
    check_cpu(op, "bias", *bias);
    check_floating(op, "bias", *bias);
    check_shape(op, "bias", *bias, {w.N}, "[out_features]", "out_features");
    bias_owner = torch::stable::contiguous(*bias);
    args.bias = bias_owner.const_data_ptr();
    args.bias_element = element_of(bias_owner.scalar_type());
  }
  if (M == 0 || w.N == 0) return y;
  if (element == Element::bf16 && !quantized && has_bf16_tiles()) {
    multiply_tiles(args, x, rows);
    return y;
  }

  const bool wide = element == Element::f64 && !quantized;
  const PackedActivations activations(quantized, wide, M, w);
  args.x = activations.view;
  const ActivationArgs source{
      element, rows.data, rows.stride, M, w.K, w.group, w.groups, {nullptr, 0.0f, false}, activations.view};
  parallel_tasks((M + kSourceRows - 1) / kSourceRows, 8.0 * double(kSourceRows * w.K),
                 [&](int64_t begin, int64_t end) { pack(source, begin, end); });
  const int64_t blocks = (M + kRowBlock - 1) / kRowBlock;
  parallel_tasks(blocks * w.strips, 2.0 * double(std::min(M, kRowBlock) * kStrip * w.K),
                 [&](int64_t begin, int64_t end) { matmul(args, begin, end); });
  return y;
}

Tensor quantized_linear_backward(const Tensor& dy, const Tensor& packed, const std::string& format,
                                 int64_t out_features, int64_t in_features, int64_t group_size) {
  constexpr const char* op = "quantized_linear_backward";
  const PackedWeight w = weight_of(op, packed, format, out_features, in_features, group_size);
  check_cpu(op, "dy", dy);
  check_floating(op, "dy", dy);
  check(dy.dim() >= 1 && dy.size(dy.dim() - 1) == w.N, op, "expected dy of shape [..., out_features] = [..., ", w.N,
        "], got ", shape_of(dy));
  const MatrixRows rows = matrix_rows_of(dy);
  Tensor dx = new_rows(dy, w.K);
  if (rows.count == 0 || w.K == 0) return dx;
  const Element element = element_of(dy.scalar_type());
  const bool tiles = element == Element::bf16 && has_bf16_tiles();
  const int64_t chunks = (w.K + kBackwardInputs - 1) / kBackwardInputs;
  const int64_t panels = (w.strips * kStrip + kBackwardOutputs - 1) / kBackwardOutputs;
  const int64_t blocks = (rows.count + kBackwardRows - 1) / kBackwardRows;
  const int64_t block_rows = std::min(rows.count, kBackwardRows);
  // Enough for either form: rows up to whole vectors and outputs up to whole tiles.
  const Tensor transposed = torch::stable::new_empty(dy, {(rows.count + 15) / 16 * 16, (w.strips + 1) / 2 * 2 * kStrip},
                                                     element == Element::f64 ? ScalarType::Double : ScalarType::Float);
  const BackwardArgs args{
      w,     element, rows.data, rows.stride, rows.count, transposed.mutable_data_ptr(), panels, dx.mutable_data_ptr(),
      chunks};
  parallel_tasks(blocks * panels, 4.0 * double(block_rows * kBackwardOutputs), [&](int64_t begin, int64_t end) {
    tiles ? FW_KERNEL(transpose_dy_tiles)(args, begin, end) : FW_KERNEL(transpose_dy)(args, begin, end);
  });
  parallel_tasks(blocks * chunks, 2.0 * double(block_rows * w.N * kBackwardInputs), [&](int64_t begin, int64_t end) {
    tiles ? FW_KERNEL(backward_tiles)(args, begin, end) : FW_KERNEL(backward)(args, begin, end);
  });
  return dx;
}

}  // namespace
}  // namespace fastweights::quantization

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "quantized_linear(Tensor x, Tensor packed, Tensor? bias, str format, int out_features, int in_features, "
      "int group_size, str activation) -> Tensor");
  m.def(
      "quantized_linear_backward(Tensor dy, Tensor packed, str format, int out_features, int in_features, "
      "int group_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  using namespace fastweights::quantization;
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("quantized_linear_backward", TORCH_BOX(&quantized_linear_backward));
}
