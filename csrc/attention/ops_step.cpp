#include <torch/csrc/stable/library.h>

#include "attention/arguments.h"
#include "core/cpu_level.h"
#include "core/parallel.h"

namespace fastweights::attention {
namespace {

constexpr const char* kOp = "hybrid_attention_step";

Rows token_rows(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), 0, t.stride(1)};
}

// A state is changed where it lies, so it must lie as the kernel walks it.
void* state_data(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, const char* letters,
                 ScalarType dtype) {
  check_shape(kOp, name, t, sizes, letters, "");
  check_dtype(kOp, name, t, dtype, "");
  check_cpu(kOp, name, t);
  check(t.is_contiguous(), kOp, "expected ", name, " to be contiguous, since it is updated in place");
  return t.mutable_data_ptr();
}

Tensor hybrid_attention_step(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& qf_, const Tensor& kf_,
                             const Tensor& mix_, const OptionalTensor& g_, const OptionalTensor& sink_, Tensor k_ring,
                             Tensor v_ring, Tensor kf_ring, Tensor S, Tensor z, Tensor position, int64_t window,
                             double scale) {
  check_rank(kOp, "q", q_, 3, "[B, HQ, K]");
  check_rank(kOp, "k", k_, 3, "[B, HKV, K]");
  check_rank(kOp, "v", v_, 3, "[B, HKV, V]");
  check_rank(kOp, "qf", qf_, 3, "[B, HQ, F]");
  check_rank(kOp, "kf", kf_, 3, "[B, HKV or HQ, F]");
  check_rank(kOp, "state.k", k_ring, 4, "[B, HKV, R, K]");
  check_floating(kOp, "q", q_);
  check_cpu(kOp, "q", q_);
  const Tensor q = with_contiguous_last(q_), k = with_contiguous_last(k_), v = with_contiguous_last(v_),
               qf = with_contiguous_last(qf_), kf = with_contiguous_last(kf_), mix = torch::stable::contiguous(mix_);
  const Tensor g = g_ ? torch::stable::contiguous(*g_) : mix;
  const Tensor sink = sink_ ? torch::stable::contiguous(*sink_) : mix;
  StepArgs a;
  a.element = element_of(q.scalar_type());
  const ScalarType compute = state_dtype(q.scalar_type());
  const int64_t B = q.size(0);
  a.HQ = q.size(1);
  a.K = q.size(2);
  a.HKV = k.size(1);
  a.V = v.size(2);
  a.HF = kf.size(1);
  a.F = qf.size(2);
  a.scale = scale;
  a.window = window;
  a.ring = k_ring.size(2);
  check_shape(kOp, "k", k, {B, a.HKV, a.K}, "[B, HKV, K]", "q");
  check_shape(kOp, "v", v, {B, a.HKV, a.V}, "[B, HKV, V]", "k");
  check_groups(kOp, "k", a.HKV, a.HQ);
  check_shape(kOp, "qf", qf, {B, a.HQ, a.F}, "[B, HQ, F]", "q");
  if (a.HF != a.HKV && a.HF != a.HQ)
    fail(kOp, "expected kf with HKV = ", a.HKV, " or HQ = ", a.HQ, " heads, got ", a.HF);
  check_shape(kOp, "kf", kf, {B, a.HF, a.F}, "[B, HKV or HQ, F]", "q, qf");
  check_shape(kOp, "mix", mix, {a.HQ}, "[HQ]", "q");
  check_dtype(kOp, "mix", mix, compute, "");
  for (const auto& [name, t] : {std::pair{"k", &k}, std::pair{"v", &v}, std::pair{"qf", &qf}, std::pair{"kf", &kf}}) {
    check_same_dtype(kOp, name, *t, "q", q);
    check_cpu(kOp, name, *t);
  }
  check_cpu(kOp, "mix", mix);
  if (window < 1 || (a.ring != window && a.ring / 2 != window) || (a.ring != window && a.ring % 2 != 0))
    fail(kOp, "expected rings of window (sliding) or 2 window (terraced) slots and window of at least 1, got ", a.ring,
         " slots and window ", window);
  a.HS = a.HF;
  if (g_) {
    const int64_t rank = g.dim();
    if (rank < 1 || rank > 3)
      fail(kOp, "expected g of shape [HKV or HQ], [B, HKV or HQ] or [1, HKV or HQ, F], got ", shape_of(g));
    a.per_channel = rank == 3;
    a.HG = g.size(a.per_channel ? 1 : rank - 1);
    if (a.HG != a.HKV && a.HG != a.HQ)
      fail(kOp, "expected g with HKV = ", a.HKV, " or HQ = ", a.HQ, " heads, got ", a.HG);
    if (rank == 2) check_shape(kOp, "g", g, {B, a.HG}, "[B, HKV or HQ]", "q");
    if (a.per_channel) check_shape(kOp, "g", g, {1, a.HG, a.F}, "[1, HKV or HQ, F]", "qf");
    check_dtype(kOp, "g", g, compute, "");
    check_cpu(kOp, "g", g);
    a.HS = std::max(a.HF, a.HG);
    a.g = {g.const_data_ptr(), rank == 2 ? a.HG : 0, 0, a.per_channel ? a.F : 1};
  }
  if (sink_) {
    check_shape(kOp, "sink", sink, {B, a.HQ}, "[B, HQ]", "q");
    check_dtype(kOp, "sink", sink, compute, "");
    check_cpu(kOp, "sink", sink);
    a.sink = {sink.const_data_ptr(), a.HQ, 0, 1};
  }
  a.k_ring = state_data("state.k", k_ring, {B, a.HKV, a.ring, a.K}, "[B, HKV, R, K]", compute);
  a.v_ring = state_data("state.v", v_ring, {B, a.HKV, a.ring, a.V}, "[B, HKV, R, V]", compute);
  a.kf_ring = state_data("state.kf", kf_ring, {B, a.HF, a.ring, a.F}, "[B, HF, R, F]", compute);
  a.S = state_data("state.S", S, {B, a.HS, a.F, a.V}, "[B, HS, F, V]", compute);
  a.z = state_data("state.z", z, {B, a.HS, a.F}, "[B, HS, F]", compute);
  a.position = static_cast<int64_t*>(state_data("state.position", position, {B}, "[B]", ScalarType::Long));
  for (int64_t b = 0; b < B; ++b)
    if (a.position[b] < 0) fail(kOp, "expected state.position of at least 0, got ", a.position[b]);
  Tensor o = torch::stable::new_empty(q, {B, a.HQ, a.V});
  a.q = token_rows(q);
  a.k = token_rows(k);
  a.v = token_rows(v);
  a.qf = token_rows(qf);
  a.kf = token_rows(kf);
  a.mix = mix.const_data_ptr();
  a.o = o.mutable_data_ptr();
  const double flops = double(a.HQ / a.HS) * (2.0 * double(window) * double(a.K + a.V) + 4.0 * double(a.F * a.V));
  parallel_tasks(B * a.HS, flops, [&](int64_t begin, int64_t end) { FW_KERNEL(step)(a, begin, end); });
  // Only now, since the heads of a group read the same rings.
  FW_KERNEL(remember)(a, 0, B);
  return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "hybrid_attention_step(Tensor q, Tensor k, Tensor v, Tensor qf, Tensor kf, Tensor mix, Tensor? g, Tensor? sink, "
      "Tensor(a!) k_ring, Tensor(b!) v_ring, Tensor(c!) kf_ring, Tensor(d!) S, Tensor(e!) z, Tensor(f!) position, *, "
      "int window, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("hybrid_attention_step", TORCH_BOX(&hybrid_attention_step));
}

}  // namespace fastweights::attention
