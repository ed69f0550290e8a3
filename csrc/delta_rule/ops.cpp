#include "delta_rule/ops.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace fastweights::delta_rule {
namespace {

// `like` where the kernels can read it: float64 only beside float64.
Tensor readable(const Tensor& t, ScalarType arithmetic) {
  const bool wide = t.scalar_type() == ScalarType::Double || arithmetic == ScalarType::Double;
  return with_contiguous_last(wide ? torch::stable::to(t, arithmetic) : t);
}

// Tensors with a row, or one number, per token and head.
struct PerToken {
  const char* op;
  bool step;
  int64_t B, T;

  // n < 0: one number.
  void check(const char* name, const Tensor& t, int64_t heads, int64_t n, const char* letters,
             const char* origin) const {
    check_cpu(op, name, t);
    std::string all = step ? "[B, " : "[B, T, ";
    all += letters;
    all += ']';
    if (step && n < 0) return check_shape(op, name, t, {B, heads}, all.c_str(), origin);
    if (step) return check_shape(op, name, t, {B, heads, n}, all.c_str(), origin);
    if (n < 0) return check_shape(op, name, t, {B, T, heads}, all.c_str(), origin);
    check_shape(op, name, t, {B, T, heads, n}, all.c_str(), origin);
  }

  Rows rows(const Tensor& t) const {
    return step ? Rows{t.data_ptr(), t.stride(0), 0, t.stride(1), element_of(t.scalar_type())} : rows_of(t);
  }
};

void check_gate_parameters(const char* op, const Arguments& given, Inputs& in, const Options& options) {
  Problem& p = in.problem;
  const ScalarType arithmetic = state_dtype(in.q.scalar_type());
  const bool raw = given.A_log || options.lower_bound;
  p.decay = options.lower_bound ? Decay::bounded : raw ? Decay::softplus : Decay::given;
  p.lower_bound = options.lower_bound.value_or(0);
  check(raw || !given.dt_bias, op, "expected A_log or lower_bound with dt_bias, got neither");
  if (!raw) return;
  check(p.gate == Gate::token || p.gate == Gate::channel, op,
        given.step ? "expected g of shape [B, HV] or [B, HV, K] with A_log or lower_bound, got "
                   : "expected g of shape [B, T, HV] or [B, T, HV, K] with A_log or lower_bound, got ",
        given.g ? shape_of(*given.g) : std::string("None"));
  if (given.A_log) {
    check_floating(op, "A_log", *given.A_log);
    check_cpu(op, "A_log", *given.A_log);
    check_shape(op, "A_log", *given.A_log, {p.HV}, "[HV]", "v");
    in.A_log = with_contiguous_last(in_dtype(*given.A_log, arithmetic));
    p.A_log = in.A_log->data_ptr();
  }
  if (given.dt_bias) {
    check_floating(op, "dt_bias", *given.dt_bias);
    check_cpu(op, "dt_bias", *given.dt_bias);
    if (p.gate == Gate::channel) {
      check_shape(op, "dt_bias", *given.dt_bias, {p.HV, p.K}, "[HV, K]", "q and v");
    } else {
      check_shape(op, "dt_bias", *given.dt_bias, {p.HV}, "[HV]", "v");
    }
    in.dt_bias = torch::stable::contiguous(in_dtype(*given.dt_bias, arithmetic));
    p.bias = in.dt_bias->data_ptr();
  }
}

}  // namespace

Inputs check_inputs(const char* op, const Arguments& given, const Options& options) {
  const auto& [step, q, k, v, beta, g, erase, write, A_log, dt_bias, initial_state, cu_seqlens] = given;
  check_rank(op, "q", q, step ? 3 : 4, step ? "[B, H, K]" : "[B, T, H, K]");
  check_floating(op, "q", q);
  const int64_t B = q.size(0), T = step ? 1 : q.size(1), H = q.size(q.dim() - 2), K = q.size(q.dim() - 1);
  const PerToken per_token{op, step, B, T};
  per_token.check("k", k, H, K, "H, K", "q");
  check_rank(op, "v", v, q.dim(), step ? "[B, HV, V]" : "[B, T, HV, V]");
  const int64_t HV = v.size(v.dim() - 2), V = v.size(v.dim() - 1);
  per_token.check("v", v, HV, V, "HV, V", "q");
  fastweights::check(H > 0 ? HV % H == 0 : HV == 0, op, "expected v with a multiple of H = ", H,
                     " heads (from q), got ", HV);
  check_same_dtype(op, "k", k, "q", q);
  check_same_dtype(op, "v", v, "q", q);

  const ScalarType arithmetic = state_dtype(q.scalar_type());
  Inputs in{};
  in.q = with_contiguous_last(q), in.k = with_contiguous_last(k), in.v = with_contiguous_last(v);
  in.initial_state = initial_state;
  in.B = B;
  Problem& p = in.problem;
  p.sequences = B, p.T = T, p.H = H, p.HV = HV, p.K = K, p.V = V;
  p.tiles = 1, p.tile_width = V;
  p.cache = cache_bytes();
  p.l2norm = options.qk_l2norm;
  p.scale = options.scale;
  p.beta_range = options.beta_range;
  p.q = per_token.rows(in.q), p.k = per_token.rows(in.k), p.v = per_token.rows(in.v);
  if (cu_seqlens) {
    in.starts = starts_of(op, *cu_seqlens, B, T);
    p.starts = in.starts.data();
    p.sequences = int64_t(in.starts.size()) - 1;
  }
  if (beta) {
    check_floating(op, "beta", *beta);
    per_token.check("beta", *beta, HV, -1, "HV", "q and v");
    in.beta = in_dtype(*beta, arithmetic);
    p.beta = per_token.rows(*in.beta);
  } else {
    fastweights::check(options.beta_range == 0, op, "expected beta with a sigmoid, got None");
  }
  if (g) {
    p.gate = step ? step_gate_of(op, *g, B, HV, K) : gate_of(op, *g, B, T, HV, K);
    in.g = readable_gate(*g, p.gate, arithmetic);
    p.g = p.gate == Gate::head ? rows_of_gate(*in.g, p.gate) : per_token.rows(*in.g);
  }
  if (erase) {
    check_floating(op, "erase", *erase);
    per_token.check("erase", *erase, HV, K, "HV, K", "q and v");
    in.erase = readable(*erase, arithmetic);
    p.erase = per_token.rows(*in.erase);
  }
  if (write) {
    check_floating(op, "write", *write);
    per_token.check("write", *write, HV, V, "HV, V", "q and v");
    in.write = readable(*write, arithmetic);
    p.write = per_token.rows(*in.write);
  }
  check_gate_parameters(op, given, in, options);
  return in;
}

void lay_out_sequences(const char* op, Inputs& in, bool state_v_first, const std::string& form) {
  Problem& p = in.problem;
  p.form = form_of(op, form, p);
  check_state(op, "initial_state", in.initial_state, p, in.q, state_v_first);
  p.initial = states_of(in.initial_state, std::nullopt, state_v_first);
}

Tensor new_corrections(const Inputs& in) {
  const Problem& p = in.problem;
  return in_huge_pages(torch::stable::new_empty(in.q, {in.B, p.T, p.HV, p.V}, state_dtype(in.q.scalar_type())));
}

void run_forward(const ForwardArgs& args) {
  const Problem& p = args.p;
  parallel_tasks(p.sequences * p.tiles * p.HV,
                 (tokens_per_sequence(p) + 1) * 6 * double(p.K) * double(p.tile_width + 1),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(forward)(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> delta_rule(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& beta, const OptionalTensor& g,
    const OptionalTensor& erase, const OptionalTensor& write, const OptionalTensor& A_log,
    const OptionalTensor& dt_bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, double scale,
    bool qk_l2norm, std::optional<double> lower_bound, double beta_range, bool output_final_state, bool state_v_first,
    bool keep_states, const std::string& form) {
  Inputs in =
      check_inputs("delta_rule", {false, q, k, v, beta, g, erase, write, A_log, dt_bias, initial_state, cu_seqlens},
                   {scale, qk_l2norm, lower_bound, beta_range});
  lay_out_sequences("delta_rule", in, state_v_first, form);
  // The columns of a state are independent: their split changes no sum, so it may follow the threads.
  split_columns(in.problem, torch::stable::get_num_threads());
  const Problem& p = in.problem;
  Tensor o = in_huge_pages(torch::stable::new_empty(in.q, {in.B, p.T, p.HV, p.V}));
  Tensor final_state = output_final_state ? new_state(in.q, p, state_v_first) : none_like(in.q);
  Tensor states = keep_states ? new_kept_states(in.q, p) : none_like(in.q);
  Tensor corrections = keep_states ? new_corrections(in) : none_like(in.q);

  ForwardArgs args{};
  args.p = p;
  args.o = rows_of(o);
  if (output_final_state) args.final = states_of(final_state, std::nullopt, state_v_first);
  if (keep_states) {
    args.states = states.data_ptr();
    args.corrections = rows_of(corrections);
  }
  run_forward(args);
  return {o, final_state, states, corrections};
}

Tensor delta_rule_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& beta,
                       const OptionalTensor& g, const OptionalTensor& erase, const OptionalTensor& write,
                       const OptionalTensor& A_log, const OptionalTensor& dt_bias, Tensor state, double scale,
                       bool qk_l2norm, std::optional<double> lower_bound, double beta_range) {
  const char* op = "delta_rule_step";
  const OptionalTensor none;
  const Inputs in = check_inputs(op, {true, q, k, v, beta, g, erase, write, A_log, dt_bias, none, none},
                                 {scale, qk_l2norm, lower_bound, beta_range});
  const Problem& p = in.problem;
  check_cpu(op, "state", state);
  check_shape(op, "state", state, {in.B, p.HV, p.K, p.V}, "[B, HV, K, V]", "q and v");
  check_dtype(op, "state", state, state_dtype(q.scalar_type()), "");
  check(p.V <= 1 || state.stride(3) == 1, op, "expected state with a contiguous last dimension, got stride ",
        state.stride(3));
  Tensor o = torch::stable::new_empty(q, {in.B, p.HV, p.V});
  StepArgs args{p, {o.data_ptr(), p.HV * p.V, 0, p.V, element_of(q.scalar_type())}};
  args.p.initial = states_of(state, std::nullopt, false);
  parallel_tasks(in.B * p.HV, 8.0 * double(p.K) * double(p.V),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(step)(args, begin, end); });
  return o;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "delta_rule(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? erase, Tensor? write, Tensor? A_log, "
      "Tensor? dt_bias, Tensor? initial_state, Tensor? cu_seqlens, *, float scale, bool qk_l2norm, "
      "float? lower_bound, float beta_range, bool output_final_state, bool state_v_first, bool keep_states, str form) "
      "-> (Tensor o, Tensor final_state, Tensor states, Tensor corrections)");
  m.def(
      "delta_rule_backward(Tensor grad_o, Tensor? grad_state, Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, "
      "Tensor? erase, Tensor? write, Tensor? A_log, Tensor? dt_bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor states, Tensor corrections, *, float scale, bool qk_l2norm, float? lower_bound, float beta_range, "
      "bool state_v_first) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, Tensor dg, Tensor derase, Tensor dwrite, Tensor dA_log, "
      "Tensor ddt_bias, Tensor dinitial_state)");
  m.def(
      "delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? erase, Tensor? write, "
      "Tensor? A_log, Tensor? dt_bias, Tensor(a!) state, *, float scale, bool qk_l2norm, float? lower_bound, "
      "float beta_range) -> Tensor o");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("delta_rule", TORCH_BOX(&delta_rule));
  m.impl("delta_rule_step", TORCH_BOX(&delta_rule_step));
}

}  // namespace fastweights::delta_rule
