#include <torch/csrc/stable/library.h>

#include "attention/arguments.h"
#include "attention/gradients.h"
#include "core/cpu_level.h"
#include "core/parallel.h"

namespace fastweights::attention {
namespace {

// Rows of a head between two starts with an empty cache of keys: short enough to feed every thread.
constexpr int64_t kSegment = 256;

Arguments read_window(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                      const OptionalTensor& cu_seqlens, int64_t window, bool causal, double scale) {
  Arguments a = read_softmax_part(op, q, k, v, cu_seqlens, window, scale);
  a.in.layout = causal ? Layout::sliding : Layout::symmetric;
  a.in.window = std::min(window, std::max<int64_t>(a.T, 1));
  return a;
}

std::tuple<Tensor, Tensor> window_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const OptionalTensor& cu_seqlens, int64_t window, bool causal, double scale,
                                            bool return_lse) {
  Arguments a = read_window("window_attention", q, k, v, cu_seqlens, window, causal, scale);
  const Inputs& in = a.in;
  Tensor o = a.make({a.B, a.T, in.HQ, in.V}, q.scalar_type());
  Tensor lse = return_lse ? a.make({a.B, a.T, in.HQ}, a.compute()) : a.absent();
  ForwardArgs args{in};
  args.segment_length = kSegment;
  args.segments = std::max<int64_t>((a.T + kSegment - 1) / kSegment, 1);
  args.o = o.mutable_data_ptr();
  args.lse = return_lse ? lse.mutable_data_ptr() : nullptr;
  parallel_tasks(in.sequences * in.HQ * args.segments, flops_per_query(in) * double(std::min(a.T, kSegment)),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(forward)(args, begin, end); });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> window_attention_backward(const Tensor& grad_o, const OptionalTensor& grad_lse,
                                                             const Tensor& q, const Tensor& k, const Tensor& v,
                                                             const OptionalTensor& cu_seqlens, int64_t window,
                                                             bool causal, double scale) {
  const char* op = "window_attention_backward";
  Arguments a = read_window(op, q, k, v, cu_seqlens, window, causal, scale);
  check_shape(op, "grad_o", grad_o, {a.B, a.T, a.in.HQ, a.in.V}, "[B, T, HQ, V]", "q, v");
  check_same_dtype(op, "grad_o", grad_o, "q", q);
  Gradients gradients(a, grad_o);
  if (grad_lse) {
    check_shape(op, "grad_lse", *grad_lse, {a.B, a.T, a.in.HQ}, "[B, T, HQ]", "q");
    check_dtype(op, "grad_lse", *grad_lse, a.compute(), "");
    gradients.args.dlse = a.contiguous(*grad_lse);
  }
  gradients.run();
  return {gradients.dq, gradients.dk(), gradients.dv()};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "window_attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, *, int window, bool causal, float scale, "
      "bool return_lse) -> (Tensor o, Tensor lse)");
  m.def(
      "window_attention_backward(Tensor grad_o, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, "
      "*, int window, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}

}  // namespace fastweights::attention
