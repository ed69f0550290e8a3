#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>

#include "core/check.h"
#include "core/cpu_level.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "core/recurrence_ops.h"
#include "norms/kernel.h"

namespace fastweights::norms {
namespace {

// Up to three dimensions of rows are read as they lie; a tensor of more is read as a matrix.
Tensor readable(const Tensor& t) {
  if (t.dim() <= 4) return with_contiguous_last(t);
  return torch::stable::contiguous(t);
}

RowSet row_set(const Tensor& t, int64_t D) {
  RowSet r{t.data_ptr(), {}};
  const int64_t dims = t.dim() - 1;
  if (dims > 3) {
    r.strides[2] = D;
  } else {
    for (int64_t i = 0; i < dims; ++i) r.strides[3 - dims + i] = t.stride(i);
  }
  return r;
}

// The checked arguments. The tensors are kept because `problem` points into them.
struct Inputs {
  Tensor x;
  OptionalTensor gate, weight;
  Problem problem;
  int64_t tasks;
};

Gate gate_of(const char* op, const std::string& activation) {
  if (activation == "silu") return Gate::silu;
  if (activation == "sigmoid") return Gate::sigmoid;
  fail(op, "expected activation silu or sigmoid, got ", activation);
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_cpu(op, name, t);
  const auto expected = x.sizes(), got = t.sizes();
  bool same = expected.size() == got.size();
  for (size_t i = 0; same && i < got.size(); ++i) same = expected[i] == got[i];
  check(same, op, "expected ", name, " of shape [..., D] = ", shape_of(x), " (from x), got ", shape_of(t));
  check_same_dtype(op, name, t, "x", x);
}

Inputs check_inputs(const char* op, const Tensor& x, const OptionalTensor& gate, const OptionalTensor& weight,
                    Gate activation, double eps) {
  check(x.dim() > 0, op, "expected x of shape [..., D], got ", shape_of(x));
  check_floating(op, "x", x);
  check_cpu(op, "x", x);
  const int64_t dims = x.dim() - 1, D = x.size(dims);
  Inputs in{readable(x), {}, {}, {}, 0};
  Problem& p = in.problem;
  if (weight) {
    check_cpu(op, "weight", *weight);
    check_floating(op, "weight", *weight);
    check_shape(op, "weight", *weight, {D}, "[D]", "x");
    in.weight = with_contiguous_last(in_dtype(*weight, state_dtype(x.scalar_type())));
  }
  p.rows = 1;
  for (int64_t i = 0; i < dims; ++i) p.rows *= x.size(i);
  if (D == 0) p.rows = 0;
  for (int64_t i = 0; i < 3; ++i) p.sizes[i] = 1;
  if (dims > 3) {
    p.sizes[2] = p.rows;
  } else {
    for (int64_t i = 0; i < dims; ++i) p.sizes[3 - dims + i] = x.size(i);
  }
  p.x = row_set(in.x, D);
  if (gate) {
    check_like(op, "gate", *gate, x);
    in.gate = readable(*gate);
    p.gate = row_set(*in.gate, D);
  }
  p.weight = in.weight ? in.weight->data_ptr() : nullptr;
  p.activation = activation;
  p.element = element_of(x.scalar_type());
  p.eps = eps, p.D = D;
  in.tasks = (p.rows + kRows - 1) / kRows;
  return in;
}

double task_flops(const Problem& p) {
  return double(kRows * p.D) * (p.activation == Gate::none ? 5 : 25);
}

Tensor normalized(const char* op, const Tensor& x, const OptionalTensor& gate, const OptionalTensor& weight,
                  Gate activation, double eps) {
  const Inputs in = check_inputs(op, x, gate, weight, activation, eps);
  Tensor y = in_huge_pages(torch::stable::new_empty(x, x.sizes()));
  const ForwardArgs args{in.problem, row_set(y, in.problem.D)};
  parallel_tasks(in.tasks, task_flops(in.problem),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(forward)(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> differentiated(const char* op, const Tensor& grad_y, const Tensor& x,
                                                  const OptionalTensor& gate, const OptionalTensor& weight,
                                                  Gate activation, double eps) {
  const Inputs in = check_inputs(op, x, gate, weight, activation, eps);
  const Problem& p = in.problem;
  check_like(op, "grad_y", grad_y, x);
  const Tensor dy = readable(grad_y);
  const Tensor none = torch::stable::new_empty(x, {0});
  Tensor dx = in_huge_pages(torch::stable::new_empty(x, x.sizes()));
  Tensor dgate = gate ? in_huge_pages(torch::stable::new_empty(x, x.sizes())) : none;
  Tensor partial = torch::stable::new_empty(x, {weight ? in.tasks : 0, p.D}, state_dtype(x.scalar_type()));
  BackwardArgs args{p, row_set(dy, p.D), row_set(dx, p.D), {}, weight ? partial.data_ptr() : nullptr};
  if (gate) args.dgate = row_set(dgate, p.D);
  parallel_tasks(in.tasks, 2 * task_flops(p),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(backward)(args, begin, end); });
  const Tensor dweight = weight ? torch::stable::to(summed_rows(partial, p.D), weight->scalar_type()) : none;
  return {dx, dgate, dweight};
}

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
  return normalized("rms_norm", x, std::nullopt, weight, Gate::none, eps);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const Tensor& x, const OptionalTensor& weight,
                                             double eps) {
  const auto [dx, dgate, dweight] =
      differentiated("rms_norm_backward", grad_y, x, std::nullopt, weight, Gate::none, eps);
  return {dx, dweight};
}

Tensor gated_rms_norm(const Tensor& x, const Tensor& gate, const OptionalTensor& weight, const std::string& activation,
                      double eps) {
  const char* op = "gated_rms_norm";
  return normalized(op, x, gate, weight, gate_of(op, activation), eps);
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& gate,
                                                           const OptionalTensor& weight, const std::string& activation,
                                                           double eps) {
  const char* op = "gated_rms_norm_backward";
  return differentiated(op, grad_y, x, gate, weight, gate_of(op, activation), eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, *, float eps) -> Tensor y");
  m.def("rms_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, *, float eps) -> (Tensor dx, Tensor dweight)");
  m.def("gated_rms_norm(Tensor x, Tensor gate, Tensor? weight, *, str activation, float eps) -> Tensor y");
  m.def(
      "gated_rms_norm_backward(Tensor grad_y, Tensor x, Tensor gate, Tensor? weight, *, str activation, float eps) "
      "-> (Tensor dx, Tensor dgate, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("gated_rms_norm", TORCH_BOX(&gated_rms_norm));
  m.impl("gated_rms_norm_backward", TORCH_BOX(&gated_rms_norm_backward));
}

}  // namespace fastweights::norms
