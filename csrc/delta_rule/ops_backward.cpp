#include <torch/csrc/stable/library.h>

#include <tuple>

#include "delta_rule/ops.h"

namespace fastweights::delta_rule {
namespace {

// Gradients of what several tasks share are exact per task and summed in a fixed order afterwards, so the split follows
// the shape alone: this many tasks, whatever the number of threads.
constexpr int64_t kTasks = 4;

// The state before every segment and the correction of every token, as the forward keeps them.
struct Kept {
  Tensor states, corrections;
};

Kept keep_again(const Inputs& in) {
  Kept kept{new_kept_states(in.q, in.problem), new_corrections(in)};
  ForwardArgs args{};
  args.p = in.problem;
  args.states = kept.states.data_ptr();
  args.corrections = rows_of(kept.corrections);
  args.only_states = true;
  split_columns(args.p, torch::stable::get_num_threads());
  run_forward(args);
  return kept;
}

Kept check_kept(const char* op, const Inputs& in, const Tensor& states, const Tensor& corrections) {
  const Problem& p = in.problem;
  check_kept_states(op, states, in.q, p);
  check_cpu(op, "corrections", corrections);
  check_shape(op, "corrections", corrections, {in.B, p.T, p.HV, p.V}, "[B, T, HV, V]", "v");
  check_dtype(op, "corrections", corrections, state_dtype(in.q.scalar_type()), "");
  return {states, with_contiguous_last(corrections)};
}

Tensor as(const Tensor& t, const OptionalTensor& like) {
  return torch::stable::to(torch::stable::reshape(t, like->sizes()), like->scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> delta_rule_backward(
    const Tensor& grad_o, const OptionalTensor& grad_state, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& beta, const OptionalTensor& g, const OptionalTensor& erase, const OptionalTensor& write,
    const OptionalTensor& A_log, const OptionalTensor& dt_bias, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, const Tensor& states, const Tensor& corrections, double scale, bool qk_l2norm,
    std::optional<double> lower_bound, double beta_range, bool state_v_first) {
  const char* op = "delta_rule_backward";
  Inputs in = check_inputs(op, {false, q, k, v, beta, g, erase, write, A_log, dt_bias, initial_state, cu_seqlens},
                           {scale, qk_l2norm, lower_bound, beta_range});
  lay_out_sequences(op, in, state_v_first, "chunked");
  Problem& p = in.problem;
  check_shape(op, "grad_o", grad_o, {in.B, p.T, p.HV, p.V}, "[B, T, HV, V]", "v");
  check_same_dtype(op, "grad_o", grad_o, "q", q);
  check_cpu(op, "grad_o", grad_o);
  check_state(op, "grad_state", grad_state, p, q, state_v_first);
  check_cpu(op, "states", states);
  const Kept kept = states.numel() == 0 ? keep_again(in) : check_kept(op, in, states, corrections);
  split_columns(p, kTasks);

  const ScalarType wide = state_dtype(q.scalar_type());
  const int64_t heads = p.tiles * p.HV, gates = p.gate == Gate::channel ? p.K : 1;
  const Tensor grad_rows = with_contiguous_last(grad_o);
  const auto wide_empty = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(q, sizes, wide);
  };
  // Of a row that `sharers` tasks share: one each.
  const auto rows_for = [&](const Tensor& like, bool shared) {
    return in_huge_pages(shared ? wide_empty({in.B, p.T, heads, p.K}) : torch::stable::new_empty(like, like.sizes()));
  };
  Tensor dq = rows_for(in.q, heads != p.H), dk = rows_for(in.k, heads != p.H);
  Tensor dv = rows_for(in.v, false);
  // Outputs never share memory, absent ones neither.
  Tensor dbeta = none_like(q), dg = none_like(q), derase = none_like(q), dwrite = none_like(q);
  Tensor dA_log = none_like(q), ddt_bias = none_like(q), dinitial = none_like(q);

  BackwardArgs args{};
  if (beta) {
    dbeta = wide_empty({in.B, p.T, heads, 1});
    args.dbeta = rows_of(dbeta);
  }
  if (p.gate == Gate::head) {
    dg = wide_empty({p.sequences, heads});
    args.dg = {dg.data_ptr(), heads, 0, 1, element_of(wide)};
  } else if (p.gate != Gate::none) {
    dg = in_huge_pages(wide_empty({in.B, p.T, heads, gates}));
    args.dg = rows_of(dg);
  }
  if (erase) {
    derase = rows_for(*in.erase, p.tiles > 1);
    args.derase = rows_of(derase);
  }
  if (write) {
    dwrite = rows_for(*in.write, false);
    args.dwrite = rows_of(dwrite);
  }
  if (A_log) {
    dA_log = wide_empty({p.sequences, heads});
    args.dA_log = dA_log.data_ptr();
  }
  if (dt_bias) {
    ddt_bias = wide_empty({p.sequences, heads, gates});
    args.dbias = ddt_bias.data_ptr();
  }
  if (initial_state) {
    dinitial = new_state(q, p, state_v_first);
    args.grad_initial = states_of(dinitial, std::nullopt, state_v_first);
  }
  args.grad_o = rows_of(grad_rows);
  args.grad_final = states_of(grad_state, std::nullopt, state_v_first);
  args.states = kept.states.data_ptr();
  args.corrections = rows_of(kept.corrections);
  args.dq = rows_of(dq), args.dk = rows_of(dk), args.dv = rows_of(dv);
  args.p = p;
  parallel_tasks(p.sequences * heads, (tokens_per_sequence(p) + 1) * 14 * double(p.K) * double(p.tile_width + 1),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(backward)(args, begin, end); });

  if (heads != p.H) {
    dq = summed_heads(dq, q, p);
    dk = summed_heads(dk, k, p);
  }
  // Sums over the tiles of V, where there are several.
  const auto over_tiles = [&](const Tensor& partial, int64_t n) {
    return p.tiles > 1 ? summed_heads(partial, wide_empty({in.B, p.T, p.HV, n}), p) : partial;
  };
  if (beta) dbeta = as(over_tiles(dbeta, 1), beta);
  if (g) dg = as(p.gate == Gate::head ? summed_rows(dg, p.HV) : over_tiles(dg, gates), g);
  if (erase) derase = as(over_tiles(derase, p.K), erase);
  if (write) dwrite = as(dwrite, write);
  if (A_log) dA_log = as(summed_rows(dA_log, p.HV), A_log);
  if (dt_bias) ddt_bias = as(summed_rows(ddt_bias, p.HV * gates), dt_bias);
  return {dq, dk, dv, dbeta, dg, derase, dwrite, dA_log, ddt_bias, dinitial};
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("delta_rule_backward", TORCH_BOX(&delta_rule_backward));
}

}  // namespace fastweights::delta_rule
