#include <torch/csrc/stable/library.h>

#include "attention/arguments.h"
#include "attention/gradients.h"
#include "core/cpu_level.h"
#include "core/parallel.h"

namespace fastweights::attention {
namespace {

// The six tensors of the past, all or none.
struct Past {
  const OptionalTensor &k, &v, &kf, &S, &z, &position;
};

Arguments read_hybrid(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& qf,
                      const Tensor& kf, const Tensor& mix, const OptionalTensor& g, const OptionalTensor& sink,
                      const Past& past, const OptionalTensor& cu_seqlens, int64_t window, bool terraced, double scale) {
  Arguments a = read_softmax_part(op, q, k, v, cu_seqlens, window, scale);
  Inputs& in = a.in;
  in.layout = terraced ? Layout::terraced : Layout::sliding;
  check_rank(op, "qf", qf, 4, "[B, T, HQ, F]");
  check_rank(op, "kf", kf, 4, "[B, T, HKV or HQ, F]");
  in.F = qf.size(3);
  in.HF = kf.size(2);
  check(in.F >= 1, op, "expected qf with F of at least 1, got ", shape_of(qf));
  check_shape(op, "qf", qf, {a.B, a.T, in.HQ, in.F}, "[B, T, HQ, F]", "q");
  check(in.HF == in.HKV || in.HF == in.HQ, op, "expected kf with HKV = ", in.HKV, " or HQ = ", in.HQ, " heads, got ",
        in.HF);
  check_shape(op, "kf", kf, {a.B, a.T, in.HF, in.F}, "[B, T, HKV or HQ, F]", "q, qf");
  check_shape(op, "mix", mix, {in.HQ}, "[HQ]", "q");
  check_same_dtype(op, "qf", qf, "q", q);
  check_same_dtype(op, "kf", kf, "q", q);
  check_dtype(op, "mix", mix, a.compute(), "");
  for (const auto& [name, t] : {std::pair{"qf", &qf}, std::pair{"kf", &kf}, std::pair{"mix", &mix}})
    check_cpu(op, name, *t);
  in.qf = a.rows(qf);
  in.kf = a.rows(kf);
  in.mix = a.contiguous(mix);
  in.HS = in.HF;
  if (g) {
    check(g->dim() >= 1 && g->dim() <= 3, op,
          "expected g of shape [HKV or HQ], [HKV or HQ, F] or [B, T, HKV or HQ], got ", shape_of(*g));
    in.per_channel = g->dim() == 2;
    const int64_t heads = g->size(in.per_channel ? 0 : g->dim() - 1);
    check(heads == in.HKV || heads == in.HQ, op, "expected g with HKV = ", in.HKV, " or HQ = ", in.HQ, " heads, got ",
          heads);
    if (g->dim() == 3) check_shape(op, "g", *g, {a.B, a.T, heads}, "[B, T, HKV or HQ]", "q");
    if (in.per_channel) check_shape(op, "g", *g, {heads, in.F}, "[HKV or HQ, F]", "qf");
    check_dtype(op, "g", *g, a.compute(), "");
    check_cpu(op, "g", *g);
    in.HS = std::max(in.HF, heads);
    a.held.push_back(torch::stable::contiguous(*g));
    const int64_t token = g->dim() == 3 ? heads : 0;
    in.g = {a.held.back().const_data_ptr(), token * a.T, token, in.per_channel ? in.F : 1};
    in.HG = heads;
  }
  if (sink) {
    check_shape(op, "sink", *sink, {a.B, a.T, in.HQ}, "[B, T, HQ]", "q");
    check_dtype(op, "sink", *sink, a.compute(), "");
    check_cpu(op, "sink", *sink);
    in.sink = {a.contiguous(*sink), in.HQ * a.T, in.HQ, 1};
  }
  const bool some = past.k || past.v || past.kf || past.S || past.z || past.position;
  if (!some) {
    in.window = std::min(window, std::max<int64_t>(a.T, 1));
    return a;
  }
  check(past.k && past.v && past.kf && past.S && past.z && past.position, op,
        "expected all six tensors of a state or none, got some");
  in.ring = (terraced ? 2 : 1) * std::min(window, int64_t(1) << 48);
  const int64_t N = in.sequences;
  check_shape(op, "state.k", *past.k, {N, in.HKV, in.ring, in.K}, "[N, HKV, R, K]", "k, window");
  check_shape(op, "state.v", *past.v, {N, in.HKV, in.ring, in.V}, "[N, HKV, R, V]", "v, window");
  check_shape(op, "state.kf", *past.kf, {N, in.HF, in.ring, in.F}, "[N, HF, R, F]", "kf, window");
  check_shape(op, "state.S", *past.S, {N, in.HS, in.F, in.V}, "[N, HS, F, V]", "kf, g, v");
  check_shape(op, "state.z", *past.z, {N, in.HS, in.F}, "[N, HS, F]", "kf, g");
  check_shape(op, "state.position", *past.position, {N}, "[N]", "q");
  check_dtype(op, "state.position", *past.position, ScalarType::Long, "");
  for (const auto& [name, t] :
       {std::pair{"state.k", &past.k}, std::pair{"state.v", &past.v}, std::pair{"state.kf", &past.kf},
        std::pair{"state.S", &past.S}, std::pair{"state.z", &past.z}}) {
    check_dtype(op, name, **t, a.compute(), "");
    check_cpu(op, name, **t);
  }
  check_cpu(op, "state.position", *past.position);
  in.k_ring = a.contiguous(*past.k);
  in.v_ring = a.contiguous(*past.v);
  in.kf_ring = a.contiguous(*past.kf);
  in.S0 = a.contiguous(*past.S);
  in.z0 = a.contiguous(*past.z);
  in.position = static_cast<const int64_t*>(a.contiguous(*past.position));
  for (int64_t n = 0; n < N; ++n)
    check(in.position[n] >= 0 && in.position[n] < (int64_t(1) << 48), op,
          "expected state.position of at least 0 and below 2^48, got ", in.position[n]);
  return a;
}

std::tuple<Tensor, Tensor, Tensor> hybrid_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& qf, const Tensor& kf, const Tensor& mix,
    const OptionalTensor& g, const OptionalTensor& sink, const OptionalTensor& k_ring, const OptionalTensor& v_ring,
    const OptionalTensor& kf_ring, const OptionalTensor& S0, const OptionalTensor& z0, const OptionalTensor& position,
    const OptionalTensor& cu_seqlens, int64_t window, bool terraced, double scale, bool output_final_state) {
  Arguments a = read_hybrid("hybrid_attention", q, k, v, qf, kf, mix, g, sink,
                            {k_ring, v_ring, kf_ring, S0, z0, position}, cu_seqlens, window, terraced, scale);
  const Inputs& in = a.in;
  Tensor o = a.make({a.B, a.T, in.HQ, in.V}, q.scalar_type());
  Tensor S = output_final_state ? a.make({in.sequences, in.HS, in.F, in.V}, a.compute()) : a.absent();
  Tensor z = output_final_state ? a.make({in.sequences, in.HS, in.F}, a.compute()) : a.absent();
  ForwardArgs args{in};
  args.segments = 1;
  args.segment_length = std::max<int64_t>(a.T, 1);
  args.o = o.mutable_data_ptr();
  args.S = output_final_state ? S.mutable_data_ptr() : nullptr;
  args.z = output_final_state ? z.mutable_data_ptr() : nullptr;
  parallel_tasks(in.sequences * in.HQ, flops_per_query(in) * double(a.T),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(forward)(args, begin, end); });
  return {o, S, z};
}

using Thirteen =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Thirteen hybrid_attention_backward(const Tensor& grad_o, const OptionalTensor& grad_S, const OptionalTensor& grad_z,
                                   const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& qf,
                                   const Tensor& kf, const Tensor& mix, const OptionalTensor& g,
                                   const OptionalTensor& sink, const OptionalTensor& k_ring,
                                   const OptionalTensor& v_ring, const OptionalTensor& kf_ring,
                                   const OptionalTensor& S0, const OptionalTensor& z0, const OptionalTensor& position,
                                   const OptionalTensor& cu_seqlens, int64_t window, bool terraced, double scale) {
  const char* op = "hybrid_attention_backward";
  Arguments a = read_hybrid(op, q, k, v, qf, kf, mix, g, sink, {k_ring, v_ring, kf_ring, S0, z0, position}, cu_seqlens,
                            window, terraced, scale);
  const Inputs& in = a.in;
  const int64_t N = in.sequences, group = in.HQ / in.HS;
  check_shape(op, "grad_o", grad_o, {a.B, a.T, in.HQ, in.V}, "[B, T, HQ, V]", "q, v");
  check_same_dtype(op, "grad_o", grad_o, "q", q);
  Gradients gradients(a, grad_o);
  BackwardArgs& args = gradients.args;
  check(grad_S.has_value() == grad_z.has_value(), op, "expected grad_S and grad_z or neither, got one");
  if (grad_S) {
    check_shape(op, "grad_S", *grad_S, {N, in.HS, in.F, in.V}, "[N, HS, F, V]", "kf, g, v");
    check_shape(op, "grad_z", *grad_z, {N, in.HS, in.F}, "[N, HS, F]", "kf, g");
    check_dtype(op, "grad_S", *grad_S, a.compute(), "");
    check_dtype(op, "grad_z", *grad_z, a.compute(), "");
    args.dS = a.contiguous(*grad_S);
    args.dz = a.contiguous(*grad_z);
  }
  Tensor dmix = a.make({N, in.HQ}, a.compute());
  Tensor dg = !g               ? a.absent()
              : in.per_channel ? a.make({N, in.HQ, in.F}, a.compute())
                               : a.make({a.B, a.T, in.HQ}, a.compute());
  Tensor dsink = sink ? a.make({a.B, a.T, in.HQ}, a.compute()) : a.absent();
  const bool past = in.position != nullptr;
  Tensor dS0 = past ? a.make({N, in.HQ, in.F, in.V}, a.compute()) : a.absent();
  Tensor dz0 = past ? a.make({N, in.HQ, in.F}, a.compute()) : a.absent();
  args.dmix = dmix.mutable_data_ptr();
  args.dg = g ? dg.mutable_data_ptr() : nullptr;
  args.dsink = sink ? dsink.mutable_data_ptr() : nullptr;
  args.dS0 = past ? dS0.mutable_data_ptr() : nullptr;
  args.dz0 = past ? dz0.mutable_data_ptr() : nullptr;
  gradients.run();

  using torch::stable::sum;
  using torch::stable::view;
  Tensor dk0 = a.absent(), dv0 = a.absent(), dkf0 = a.absent();
  Tensor dk = gradients.dk(past ? &dk0 : nullptr), dv = gradients.dv(past ? &dv0 : nullptr),
         dkf = gradients.dkf(past ? &dkf0 : nullptr);
  if (in.per_channel) {
    dg = sum(view(dg, {N, in.HG, in.HQ / in.HG, in.F}), std::vector<int64_t>{0, 2});
  } else if (g) {
    const int64_t heads = in.HG;
    const std::vector<int64_t> groups = {a.B, a.T, heads, in.HQ / heads};
    const std::vector<int64_t> over = g->dim() == 3 ? std::vector<int64_t>{3} : std::vector<int64_t>{0, 1, 3};
    dg = sum(view(dg, groups), over);
  }
  if (past) {
    dS0 = sum(view(dS0, {N, in.HS, group, in.F, in.V}), {{2}});
    dz0 = sum(view(dz0, {N, in.HS, group, in.F}), {{2}});
  }
  return {gradients.dq, dk, dv, gradients.dqf, dkf, sum(dmix, {{0}}), dg, dsink, dk0, dv0, dkf0, dS0, dz0};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "hybrid_attention(Tensor q, Tensor k, Tensor v, Tensor qf, Tensor kf, Tensor mix, Tensor? g, Tensor? sink, "
      "Tensor? k_ring, Tensor? v_ring, Tensor? kf_ring, Tensor? S0, Tensor? z0, Tensor? position, Tensor? cu_seqlens, "
      "*, "
      "int window, bool terraced, float scale, bool output_final_state) -> (Tensor o, Tensor S, Tensor z)");
  m.def(
      "hybrid_attention_backward(Tensor grad_o, Tensor? grad_S, Tensor? grad_z, Tensor q, Tensor k, Tensor v, "
      "Tensor qf, Tensor kf, Tensor mix, Tensor? g, Tensor? sink, Tensor? k_ring, Tensor? v_ring, Tensor? kf_ring, "
      "Tensor? S0, Tensor? z0, Tensor? position, Tensor? cu_seqlens, *, int window, bool terraced, float scale) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dqf, Tensor dkf, Tensor dmix, Tensor dg, Tensor dsink, "
      "Tensor dk_ring, Tensor dv_ring, Tensor dkf_ring, Tensor dS0, Tensor dz0)");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("hybrid_attention", TORCH_BOX(&hybrid_attention));
  m.impl("hybrid_attention_backward", TORCH_BOX(&hybrid_attention_backward));
}

}  // namespace fastweights::attention
