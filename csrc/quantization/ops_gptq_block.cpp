// gptq_block: the columns of one block of GPTQ, rows in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "core/check.h"
#include "core/cpu_level.h"
#include "core/parallel.h"
#include "quantization/gptq_block.h"

namespace fastweights::quantization {
namespace {

constexpr const char* kOp = "gptq_block";
constexpr double kMostCode = 1 << 21;  // exact in float32 beside the constant that rounds

Tensor matrix(const char* name, const Tensor& t, const Tensor& w, int64_t rows, int64_t columns, const char* letters) {
  check_cpu(kOp, name, t);
  check_same_dtype(kOp, name, t, "w", w);
  check_shape(kOp, name, t, {rows, columns}, letters, "w");
  return with_contiguous_last(t);
}

std::tuple<Tensor, Tensor> gptq_block_op(const Tensor& w, const Tensor& u, const Tensor& scale, const Tensor& minimum,
                                         double least, double most, const std::optional<Tensor>& p) {
  check_cpu(kOp, "w", w);
  check(w.scalar_type() == ScalarType::Float || w.scalar_type() == ScalarType::Double, kOp,
        "expected w of dtype float32 or float64, got ", dtype_name(w.scalar_type()));
  check_rank(kOp, "w", w, 2, "[N, C]");
  const auto code = [](double x) { return std::nearbyint(x) == x && std::abs(x) <= kMostCode; };
  check(code(least) && code(most) && least <= most, kOp, "expected integers least <= most of at most 2^21, got ", least,
        " and ", most);
  const int64_t N = w.size(0), C = w.size(1);
  const Tensor source = with_contiguous_last(w);
  const Tensor factor = matrix("u", u, w, C, C, "[C, C]"), scales = matrix("scale", scale, w, N, C, "[N, C]"),
               minima = matrix("minimum", minimum, w, N, C, "[N, C]");
  const Tensor spread = p ? matrix("p", *p, w, C, C, "[C, C]") : Tensor();
  Tensor codes = torch::stable::new_empty(w, {N, C}), errors = torch::stable::new_empty(w, {N, C});

  GptqBlockArgs args{};
  args.element = element_of(w.scalar_type());
  args.N = N;
  args.C = C;
  args.w = source.const_data_ptr();
  args.w_stride = source.stride(0);
  args.scale = scales.const_data_ptr();
  args.scale_stride = scales.stride(0);
  args.minimum = minima.const_data_ptr();
  args.minimum_stride = minima.stride(0);
  args.u = factor.const_data_ptr();
  args.u_stride = factor.stride(0);
  if (p) {
    args.p = spread.const_data_ptr();
    args.p_stride = spread.stride(0);
  }
  args.least = least;
  args.most = most;
  args.codes = codes.mutable_data_ptr();
  args.errors = errors.mutable_data_ptr();
  parallel_tasks((N + kRoundRows - 1) / kRoundRows, double(kRoundRows) * double(C) * double(C + 16),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(gptq_block)(args, begin, end); });
  return {codes, errors};
}

}  // namespace
}  // namespace fastweights::quantization

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "gptq_block(Tensor w, Tensor u, Tensor scale, Tensor minimum, float least, float most, Tensor? p=None) -> "
      "(Tensor codes, Tensor errors)");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("gptq_block", TORCH_BOX(&fastweights::quantization::gptq_block_op));
}
