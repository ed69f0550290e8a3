#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "linear_attention/ops.h"

namespace fastweights::linear_attention {
namespace {

// dq and dk are exact per (tile, value head) and summed in a fixed order afterwards, so the split follows the shape
// alone: this many tasks, whatever the number of threads.
constexpr int64_t kTasks = 4;

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    const Tensor& grad_o, const OptionalTensor& grad_state, const OptionalTensor& grad_z, const Tensor& q,
    const Tensor& k, const Tensor& v, const OptionalTensor& g, const OptionalTensor& o,
    const OptionalTensor& initial_state, const OptionalTensor& initial_z, const OptionalTensor& cu_seqlens,
    const Tensor& states, double scale, bool normalize, double eps, bool state_v_first, bool reverse,
    const std::string& form) {
  const char* op = "linear_attention_backward";
  const Options options{scale, eps, normalize, state_v_first, reverse, form};
  Inputs in = check_inputs(op, q, k, v, g, initial_state, initial_z, cu_seqlens, options);
  Problem& p = in.problem;
  check_shape(op, "grad_o", grad_o, {in.B, p.T, p.HV, p.V}, "[B, T, HV, V]", "v");
  check_same_dtype(op, "grad_o", grad_o, "q", q);
  check_cpu(op, "grad_o", grad_o);
  check_state(op, "grad_state", grad_state, grad_z, in, options);
  check(o.has_value() == normalize, op, "expected o with normalize and only then, got ", o ? "a tensor" : "None");
  if (o) {
    check_shape(op, "o", *o, {in.B, p.T, p.HV, p.V}, "[B, T, HV, V]", "v");
    check_same_dtype(op, "o", *o, "q", q);
    check_cpu(op, "o", *o);
  }
  check_cpu(op, "states", states);

  Tensor kept = states;
  if (p.form == Form::chunked) {
    if (states.numel() == 0) {
      kept = new_kept_states(in.q, p);
      ForwardArgs args{};
      args.p = p;
      args.states = kept.data_ptr();
      args.only_states = true;
      split_columns(args.p, torch::stable::get_num_threads());
      run_forward(args);
    } else {
      check_kept_states(op, states, q, p);
    }
  }
  split_columns(p, kTasks);

  const ScalarType wide = state_dtype(q.scalar_type());
  const int64_t heads = p.tiles * p.HV;
  const bool partial = heads != p.H;
  const Tensor grad_rows = with_contiguous_last(grad_o);
  const OptionalTensor o_rows = o ? OptionalTensor(with_contiguous_last(*o)) : std::nullopt;
  OptionalTensor grad_z_rows;
  if (grad_z) grad_z_rows = torch::stable::contiguous(*grad_z);

  BackwardArgs args{};
  const auto rows_for = [&](const Tensor& like) {
    return in_huge_pages(partial ? torch::stable::new_empty(like, {in.B, p.T, heads, p.K}, wide)
                                 : torch::stable::new_empty(like, like.sizes()));
  };
  Tensor dq = rows_for(q), dk = rows_for(k);
  Tensor dv = in_huge_pages(torch::stable::new_empty(v, v.sizes()));
  Tensor dg = none_like(in.q);
  if (p.gate == Gate::head) {
    dg = torch::stable::new_empty(q, {p.sequences, heads}, wide);
    args.dg = {dg.data_ptr(), heads, 0, 1, element_of(wide)};
  } else if (p.gate != Gate::none) {
    dg = in_huge_pages(torch::stable::new_empty(q, {in.B, p.T, heads, p.gate == Gate::channel ? p.K : 1}, wide));
    args.dg = rows_of(dg);
  }
  Tensor dinitial_state = initial_state ? new_state(in.q, p, state_v_first) : none_like(in.q);
  Tensor dinitial_z = initial_z ? new_z(in) : none_like(in.q);

  if (o_rows) args.o = rows_of(*o_rows);
  args.grad_o = rows_of(grad_rows);
  args.grad_final = states_of(grad_state, grad_z_rows, state_v_first);
  args.grad_initial = states_of(initial_state ? OptionalTensor(dinitial_state) : std::nullopt,
                                initial_z ? OptionalTensor(dinitial_z) : std::nullopt, state_v_first);
  args.states = kept.numel() ? kept.data_ptr() : nullptr;
  args.dq = rows_of(dq), args.dk = rows_of(dk), args.dv = rows_of(dv);
  args.p = p;
  parallel_tasks(p.sequences * heads, (tokens_per_sequence(p) + 1) * 10 * double(p.K) * double(p.tile_width + 1),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(backward)(args, begin, end); });

  if (partial) {
    dq = summed_heads(dq, q, p);
    dk = summed_heads(dk, k, p);
  }
  if (p.gate == Gate::head) {
    dg = summed_rows(dg, p.HV);
  } else if (p.gate != Gate::none) {
    const int64_t n = p.gate == Gate::channel ? p.K : 1;
    if (p.tiles > 1) {
      const Tensor like = torch::stable::new_empty(q, {in.B, p.T, p.HV, n}, wide);
      dg = summed_heads(dg, like, p);
    }
    dg = torch::stable::reshape(dg, g->sizes());
  }
  if (g) dg = torch::stable::to(dg, g->scalar_type());
  return {dq, dk, dv, dg, dinitial_state, dinitial_z};
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("linear_attention_backward", TORCH_BOX(&linear_attention_backward));
}

}  // namespace fastweights::linear_attention
