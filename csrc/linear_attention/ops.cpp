#include "linear_attention/ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

namespace fastweights::linear_attention {
namespace {

Tensor readable(const Tensor& t) {
  return with_contiguous_last(t);
}

}  // namespace

void check_state(const char* op, const char* name, const OptionalTensor& S, const OptionalTensor& z, const Inputs& in,
                 const Options& options) {
  const Problem& p = in.problem;
  fastweights::check_state(op, name, S, p, in.q, options.state_v_first);
  if (z) {
    check(options.normalize, op, "expected ", name, " without z unless normalize, got z of shape ", shape_of(*z));
    check_cpu(op, name, *z);
    check_shape(op, name, *z, {p.sequences, p.HV, p.K}, "z [N, HV, K]", "q, v and cu_seqlens");
    check_dtype(op, name, *z, state_dtype(in.q.scalar_type()), "");
  }
}

Inputs check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                    const OptionalTensor& initial_state, const OptionalTensor& initial_z,
                    const OptionalTensor& cu_seqlens, const Options& options) {
  check_rank(op, "q", q, 4, "[B, T, H, K]");
  check_floating(op, "q", q);
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3);
  check_shape(op, "k", k, {B, T, H, K}, "[B, T, H, K]", "q");
  check_rank(op, "v", v, 4, "[B, T, HV, V]");
  const int64_t HV = v.size(2), V = v.size(3);
  check_shape(op, "v", v, {B, T, HV, V}, "[B, T, HV, V]", "q");
  check(H > 0 ? HV % H == 0 : HV == 0, op, "expected v with a multiple of H = ", H, " heads (from q), got ", HV);
  check_same_dtype(op, "k", k, "q", q);
  check_same_dtype(op, "v", v, "q", q);
  check_cpu(op, "q", q);
  check_cpu(op, "k", k);
  check_cpu(op, "v", v);

  Inputs in{readable(q), readable(k), readable(v), {}, initial_state, initial_z, {}, {}, B};
  Problem& p = in.problem;
  p = {};
  p.normalize = options.normalize;
  p.reverse = options.reverse;
  p.scale = options.scale;
  p.eps = options.eps;
  p.sequences = B, p.T = T, p.H = H, p.HV = HV, p.K = K, p.V = V;
  p.tiles = 1, p.tile_width = V;
  p.cache = cache_bytes();
  if (cu_seqlens) {
    in.starts = starts_of(op, *cu_seqlens, B, T);
    p.starts = in.starts.data();
    p.sequences = int64_t(in.starts.size()) - 1;
  }
  if (g) {
    p.gate = gate_of(op, *g, B, T, HV, K);
    in.g = readable_gate(*g, p.gate, state_dtype(q.scalar_type()));
    p.g = rows_of_gate(*in.g, p.gate);
  }
  p.form = form_of(op, options.form, p);
  check_state(op, "initial_state", initial_state, initial_z, in, options);
  if (initial_z) in.initial_z = torch::stable::contiguous(*initial_z);
  p.initial = states_of(in.initial_state, in.initial_z, options.state_v_first);
  p.q = rows_of(in.q), p.k = rows_of(in.k), p.v = rows_of(in.v);
  return in;
}

Tensor new_z(const Inputs& in) {
  const Problem& p = in.problem;
  return torch::stable::new_empty(in.q, {p.sequences, p.HV, p.K}, state_dtype(in.q.scalar_type()));
}

void run_forward(const ForwardArgs& args) {
  const Problem& p = args.p;
  parallel_tasks(p.sequences * p.tiles * p.HV,
                 (tokens_per_sequence(p) + 1) * 4 * double(p.K) * double(p.tile_width + 1),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(forward)(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g, const OptionalTensor& initial_state,
    const OptionalTensor& initial_z, const OptionalTensor& cu_seqlens, double scale, bool normalize, double eps,
    bool output_final_state, bool state_v_first, bool reverse, bool keep_states, const std::string& form) {
  const Options options{scale, eps, normalize, state_v_first, reverse, form};
  Inputs in = check_inputs("linear_attention", q, k, v, g, initial_state, initial_z, cu_seqlens, options);
  // The columns of a state are independent: their split changes no sum, so it may follow the threads.
  split_columns(in.problem, torch::stable::get_num_threads());
  const Problem& p = in.problem;

  Tensor o = in_huge_pages(torch::stable::new_empty(in.q, {in.B, p.T, p.HV, p.V}));
  Tensor final_state = output_final_state ? new_state(in.q, p, state_v_first) : none_like(in.q);
  Tensor final_z = output_final_state && normalize ? new_z(in) : none_like(in.q);
  Tensor states = keep_states ? new_kept_states(in.q, p) : none_like(in.q);

  ForwardArgs args{};
  args.p = p;
  args.o = rows_of(o);
  if (output_final_state) {
    args.final = states_of(final_state, normalize ? OptionalTensor(final_z) : std::nullopt, state_v_first);
  }
  args.states = keep_states ? states.data_ptr() : nullptr;
  run_forward(args);
  return {o, final_state, final_z, states};
}

Tensor linear_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g, Tensor state,
                             const OptionalTensor& z, double scale, double eps) {
  const char* op = "linear_attention_step";
  check_rank(op, "q", q, 3, "[B, H, K]");
  check_floating(op, "q", q);
  const int64_t B = q.size(0), H = q.size(1), K = q.size(2);
  check_shape(op, "k", k, {B, H, K}, "[B, H, K]", "q");
  check_rank(op, "v", v, 3, "[B, HV, V]");
  const int64_t HV = v.size(1), V = v.size(2);
  check_shape(op, "v", v, {B, HV, V}, "[B, HV, V]", "q");
  check(H > 0 ? HV % H == 0 : HV == 0, op, "expected v with a multiple of H = ", H, " heads (from q), got ", HV);
  check_same_dtype(op, "k", k, "q", q);
  check_same_dtype(op, "v", v, "q", q);
  const ScalarType dtype = state_dtype(q.scalar_type());
  check_shape(op, "state", state, {B, HV, K, V}, "[B, HV, K, V]", "q and v");
  check_dtype(op, "state", state, dtype, "");
  check(V <= 1 || state.stride(3) == 1, op, "expected state with a contiguous last dimension, got stride ",
        state.stride(3));
  for (const Tensor* t : {&q, &k, &v, static_cast<const Tensor*>(&state)}) check_cpu(op, "every tensor", *t);
  if (z) {
    check_shape(op, "z", *z, {B, HV, K}, "[B, HV, K]", "q and v");
    check_dtype(op, "z", *z, dtype, "");
    check_cpu(op, "z", *z);
    check(z->is_contiguous(), op, "expected z to be contiguous, got strides of a view");
  }

  const auto rows = [](const Tensor& t) {
    return Rows{t.data_ptr(), t.stride(0), 0, t.stride(1), element_of(t.scalar_type())};
  };
  const Tensor qr = readable(q), kr = readable(k), vr = readable(v);
  OptionalTensor gr;
  StepArgs args{};
  args.q = rows(qr), args.k = rows(kr), args.v = rows(vr);
  if (g) {
    args.gate = step_gate_of(op, *g, B, HV, K);
    gr = readable_gate(*g, args.gate, dtype);
    const bool head = args.gate == Gate::head;
    args.g = {gr->data_ptr(), head ? 0 : gr->stride(0), 0, gr->stride(head ? 0 : 1), element_of(dtype)};
  }
  Tensor o = torch::stable::new_empty(q, {B, HV, V});
  args.o = rows(o);
  args.normalize = z.has_value();
  args.scale = scale, args.eps = eps;
  args.H = H, args.HV = HV, args.K = K, args.V = V;
  args.state = {state.data_ptr(), state.stride(0), state.stride(1), state.stride(2), 1, z ? z->data_ptr() : nullptr};
  parallel_tasks(B * HV, 4.0 * double(K) * double(V),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(step)(args, begin, end); });
  return o;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, Tensor? initial_z, "
      "Tensor? cu_seqlens, *, float scale, bool normalize, float eps, bool output_final_state, bool state_v_first, "
      "bool reverse, bool keep_states, str form) -> (Tensor o, Tensor final_state, Tensor final_z, Tensor states)");
  m.def(
      "linear_attention_backward(Tensor grad_o, Tensor? grad_state, Tensor? grad_z, Tensor q, Tensor k, Tensor v, "
      "Tensor? g, Tensor? o, Tensor? initial_state, Tensor? initial_z, Tensor? cu_seqlens, Tensor states, *, "
      "float scale, bool normalize, float eps, bool state_v_first, bool reverse, str form) -> (Tensor dq, Tensor dk, "
      "Tensor dv, Tensor dg, Tensor dinitial_state, Tensor dinitial_z)");
  m.def(
      "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) state, Tensor(b!)? z, *, "
      "float scale, float eps) -> Tensor o");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&linear_attention));
  m.impl("linear_attention_step", TORCH_BOX(&linear_attention_step));
}

}  // namespace fastweights::linear_attention
