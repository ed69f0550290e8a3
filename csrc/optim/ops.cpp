#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/cpu_level.h"
#include "core/parallel.h"
#include "optim/kernel.h"

namespace fastweights::optim {
namespace {

constexpr const char* kStep = "optimizer_step";
using Tensors = std::vector<Tensor>;

struct RuleFacts {
  const char* name;
  Rule rule;
  int states;
};

constexpr RuleFacts kRules[] = {
    {"adam", Rule::adam, 2},
    {"lion", Rule::lion, 1},
    {"momentum", Rule::momentum, 1},
};

RuleFacts rule_of(const std::string& name) {
  for (const RuleFacts& facts : kRules) {
    if (name == facts.name) return facts;
  }
  fail(kStep, "expected rule adam, lion or momentum, got '", name, "'");
}

void check_block(const char* op, int64_t block) {
  check(block >= kMinBlock && block <= kMaxBlock && (block & (block - 1)) == 0, op,
        "expected block_size to be a power of two from ", kMinBlock, " to ", kMaxBlock, ", got ", block);
}

int64_t blocks_of(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

// The correction of Adam's zero-initialised means: with c_i = 1 - beta_i^step, lr (m / c_1) / (sqrt(v / c_2) + eps) is
// rate m / (sqrt(v) + eps sqrt(c_2)) with rate = lr sqrt(c_2) / c_1.
Coefficients coefficients_of(Rule rule, int64_t step, double lr, double beta1, double beta2, double eps,
                             double weight_decay) {
  Coefficients c{lr, 1 - lr * weight_decay, beta1, beta2, eps, weight_decay};
  if (rule == Rule::adam) {
    const double root2 = std::sqrt(1 - std::pow(beta2, double(step)));
    c.rate = lr * root2 / (1 - std::pow(beta1, double(step)));
    c.eps = eps * root2;
  }
  return c;
}

void check_numbers(int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  check(step >= 1, kStep, "expected step >= 1, got ", step);
  const auto fraction = [](const char* name, double beta) {
    check(beta >= 0 && beta < 1, kStep, "expected 0 <= ", name, " < 1, got ", beta);
  };
  const auto size = [](const char* name, double x) {
    check(x >= 0 && std::isfinite(x), kStep, "expected a finite ", name, " >= 0, got ", x);
  };
  fraction("beta1", beta1);
  fraction("beta2", beta2);
  size("lr", lr);
  size("eps", eps);
  size("weight_decay", weight_decay);
}

void check_count(const char* name, const Tensors& list, size_t count) {
  check(list.size() == count, kStep, "expected ", count, " tensors in ", name, " (from params), got ", list.size());
}

void check_same_shape(const char* name, const Tensor& t, const Tensor& param) {
  const auto expected = param.sizes(), got = t.sizes();
  bool same = expected.size() == got.size();
  for (size_t i = 0; same && i < got.size(); ++i) same = expected[i] == got[i];
  check(same, kStep, "expected ", name, " of shape ", shape_of(param), " (from params), got ", shape_of(t));
}

void check_in_place(const char* name, const Tensor& t) {
  check_cpu(kStep, name, t);
  check(t.is_contiguous(), kStep, "expected ", name, " to be contiguous, got another layout");
}

struct Lists {
  const Tensors &params, &grads, *states[kMaxStates], *absmax[kMaxStates];
};

constexpr const char* kStateNames[] = {"state1", "state2"};
constexpr const char* kAbsmaxNames[] = {"absmax1", "absmax2"};

// Pointers to the tensors of one parameter, each checked. Copies of gradients with other strides live in `copies`.
StepTensor checked(const Lists& lists, size_t i, int states, bool quantized, int64_t block, Tensors& copies) {
  const Tensor& param = lists.params[i];
  check_in_place("params", param);
  check_floating(kStep, "params", param);
  const ScalarType dtype = param.scalar_type();
  check(!quantized || dtype != ScalarType::Double, kStep,
        "expected params of dtype float32, bfloat16 or float16 for states of 8 bits, got float64");
  const Tensor& grad = lists.grads[i];
  check_cpu(kStep, "grads", grad);
  check_same_shape("grads", grad, param);
  check_same_dtype(kStep, "grads", grad, "params", param);
  StepTensor t{param.mutable_data_ptr(), nullptr, {}, {}, param.numel(), 0, element_of(dtype)};
  if (grad.is_contiguous()) {
    t.grad = grad.const_data_ptr();
  } else {
    copies.push_back(torch::stable::contiguous(grad));
    t.grad = copies.back().const_data_ptr();
  }
  for (int s = 0; s < states; ++s) {
    const Tensor& state = (*lists.states[s])[i];
    check_in_place(kStateNames[s], state);
    check_same_shape(kStateNames[s], state, param);
    check_dtype(kStep, kStateNames[s], state, quantized ? ScalarType::Byte : state_dtype(dtype),
                quantized ? " (since absmax1 is there)" : "");
    t.states[s] = state.mutable_data_ptr();
    if (!quantized) continue;
    const Tensor& absmax = (*lists.absmax[s])[i];
    check_in_place(kAbsmaxNames[s], absmax);
    check_dtype(kStep, kAbsmaxNames[s], absmax, ScalarType::Float, "");
    check_shape(kStep, kAbsmaxNames[s], absmax, {blocks_of(t.size, block)}, "[ceil(numel / block_size)]", "params");
    t.absmax[s] = static_cast<float*>(absmax.mutable_data_ptr());
  }
  return t;
}

uint64_t seed_of(const Tensor& seed) {
  check_cpu(kStep, "seed", seed);
  check_dtype(kStep, "seed", seed, ScalarType::Long, "");
  check(seed.numel() == 1, kStep, "expected a seed of one number, got shape ", shape_of(seed));
  return uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

void optimizer_step(const Tensors& params, const Tensors& grads, const Tensors& state1, const Tensors& state2,
                    const Tensors& absmax1, const Tensors& absmax2, const std::string& rule, int64_t step, double lr,
                    double beta1, double beta2, double eps, double weight_decay, int64_t block_size,
                    const std::optional<Tensor>& seed) {
  const RuleFacts facts = rule_of(rule);
  check_numbers(step, lr, beta1, beta2, eps, weight_decay);
  check_block(kStep, block_size);
  const bool quantized = !absmax1.empty();
  const Lists lists{params, grads, {&state1, &state2}, {&absmax1, &absmax2}};
  check_count("grads", grads, params.size());
  for (int s = 0; s < kMaxStates; ++s) {
    check_count(kStateNames[s], *lists.states[s], s < facts.states ? params.size() : 0);
    check_count(kAbsmaxNames[s], *lists.absmax[s], s < facts.states && quantized ? params.size() : 0);
  }
  Tensors copies;
  std::vector<StepTensor> tensors;
  tensors.reserve(params.size());
  int64_t tasks = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    StepTensor t = checked(lists, i, facts.states, quantized, block_size, copies);
    t.first_task = tasks;
    tasks += tasks_of(t.size);
    if (t.size > 0) tensors.push_back(t);
  }
  const StepArgs args{tensors.data(),   int64_t(tensors.size()),
                      facts.rule,       quantized,
                      block_size,       coefficients_of(facts.rule, step, lr, beta1, beta2, eps, weight_decay),
                      seed.has_value(), seed ? seed_of(*seed) : 0};
  parallel_tasks(tasks, kTaskElements * (quantized ? 60.0 : 20.0),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(step)(args, begin, end); });
}

double codec_flops() {
  return kTaskElements * 20.0;
}

std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& x, bool is_signed, int64_t block_size) {
  const char* op = "quantize_blockwise";
  check_cpu(op, "x", x);
  const ScalarType dtype = x.scalar_type();
  check(is_floating(dtype) && dtype != ScalarType::Double, op, "expected x of dtype float32, bfloat16 or float16, got ",
        dtype_name(dtype));
  check_block(op, block_size);
  const Tensor in = torch::stable::contiguous(x);
  const int64_t size = x.numel();
  Tensor codes = torch::stable::new_empty(x, x.sizes(), ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(x, {blocks_of(size, block_size)}, ScalarType::Float);
  const CodecArgs args{element_of(dtype),
                       in.data_ptr(),
                       static_cast<uint8_t*>(codes.data_ptr()),
                       static_cast<float*>(absmax.data_ptr()),
                       size,
                       block_size,
                       is_signed};
  parallel_tasks(tasks_of(size), codec_flops(),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(quantize_blockwise)(args, begin, end); });
  return {codes, absmax};
}

Tensor dequantize_blockwise(const Tensor& codes, const Tensor& absmax, bool is_signed, int64_t block_size) {
  const char* op = "dequantize_blockwise";
  check_cpu(op, "codes", codes);
  check_dtype(op, "codes", codes, ScalarType::Byte, "");
  check_block(op, block_size);
  check_cpu(op, "absmax", absmax);
  check_dtype(op, "absmax", absmax, ScalarType::Float, "");
  const int64_t size = codes.numel();
  check_shape(op, "absmax", absmax, {blocks_of(size, block_size)}, "[ceil(numel / block_size)]", "codes");
  const Tensor in = torch::stable::contiguous(codes), scales = torch::stable::contiguous(absmax);
  Tensor x = torch::stable::new_empty(codes, codes.sizes(), ScalarType::Float);
  const CodecArgs args{
      Element::f32, x.data_ptr(), static_cast<uint8_t*>(in.data_ptr()), static_cast<float*>(scales.data_ptr()), size,
      block_size,   is_signed};
  parallel_tasks(tasks_of(size), codec_flops(),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(dequantize_blockwise)(args, begin, end); });
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "optimizer_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] "
      "absmax1, Tensor(e!)[] absmax2, *, str rule, int step, float lr, float beta1, float beta2, float eps, float "
      "weight_decay, int block_size, Tensor? seed) -> ()");
  m.def("quantize_blockwise(Tensor x, *, bool signed, int block_size) -> (Tensor codes, Tensor absmax)");
  m.def("dequantize_blockwise(Tensor codes, Tensor absmax, *, bool signed, int block_size) -> Tensor x");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("optimizer_step", TORCH_BOX(&optimizer_step));
  m.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&dequantize_blockwise));
}

}  // namespace fastweights::optim
