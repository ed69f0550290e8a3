#include "linear_attention/ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "core/check.h"
#include "core/cpu_level.h"
#include "core/parallel.h"

namespace fastweights::linear_attention {
namespace {

// Sequences shorter than this on average run token by token.
constexpr int64_t kShort = 16;

Tensor readable(const Tensor& t) {
  return with_contiguous_last(t);
}

Gate gate_of(const char* op, const Tensor& g, int64_t B, int64_t T, int64_t HV, int64_t K) {
  check_floating(op, "g", g);
  check_cpu(op, "g", g);
  switch (g.dim()) {
    case 1:
      check_shape(op, "g", g, {HV}, "[HV]", "v");
      return Gate::head;
    case 3:
      check_shape(op, "g", g, {B, T, HV}, "[B, T, HV]", "q and v");
      return Gate::token;
    case 4:
      check_shape(op, "g", g, {B, T, HV, K}, "[B, T, HV, K]", "q and v");
      return Gate::channel;
    default:
      fail(op, "expected g of shape [HV], [B, T, HV] or [B, T, HV, K], got ", shape_of(g));
  }
}

template <typename Index>
std::vector<int64_t> starts_of(const char* op, const Tensor& cu_seqlens, int64_t T) {
  const Index* values = cu_seqlens.const_data_ptr<Index>();
  std::vector<int64_t> starts(cu_seqlens.size(0));
  for (size_t i = 0; i < starts.size(); ++i) starts[i] = values[i * cu_seqlens.stride(0)];
  check(starts.front() == 0, op, "expected cu_seqlens to begin with 0, got ", starts.front());
  for (size_t i = 1; i < starts.size(); ++i)
    check(starts[i - 1] <= starts[i], op, "expected cu_seqlens to ascend, got ", starts[i], " after ", starts[i - 1]);
  check(starts.back() == T, op, "expected cu_seqlens to end with T = ", T, ", got ", starts.back());
  return starts;
}

Form form_of(const char* op, const std::string& form, const Inputs& in) {
  if (form == "recurrent") return Form::recurrent;
  if (form == "chunked") return Form::chunked;
  check(form == "auto", op, "expected form of auto, recurrent or chunked, got ", form);
  const int64_t tokens = in.problem.starts ? in.problem.T : in.problem.T * in.problem.sequences;
  return tokens < kShort * in.problem.sequences ? Form::recurrent : Form::chunked;
}

}  // namespace

Rows rows_of(const Tensor& t) {
  const auto strides = t.strides();
  return {t.data_ptr(), strides[0], strides[1], strides[2], element_of(t.scalar_type())};
}

States states_of(const OptionalTensor& S, const OptionalTensor& z, bool v_first) {
  States states;
  if (S) {
    const auto strides = S->strides();
    states = {S->data_ptr(), strides[0], strides[1], strides[v_first ? 3 : 2], strides[v_first ? 2 : 3], nullptr};
  }
  if (z) states.z = z->data_ptr();
  return states;
}

void check_state(const char* op, const char* name, const OptionalTensor& S, const OptionalTensor& z, const Inputs& in,
                 const Options& options) {
  const Problem& p = in.problem;
  const ScalarType dtype = state_dtype(in.q.scalar_type());
  if (S) {
    const auto [rows, columns] = options.state_v_first ? std::pair(p.V, p.K) : std::pair(p.K, p.V);
    check_cpu(op, name, *S);
    check_shape(op, name, *S, {p.sequences, p.HV, rows, columns},
                options.state_v_first ? "[N, HV, V, K]" : "[N, HV, K, V]", "q, v and cu_seqlens");
    check_dtype(op, name, *S, dtype, "");
  }
  if (z) {
    check(options.normalize, op, "expected ", name, " without z unless normalize, got z of shape ", shape_of(*z));
    check_cpu(op, name, *z);
    check_shape(op, name, *z, {p.sequences, p.HV, p.K}, "z [N, HV, K]", "q, v and cu_seqlens");
    check_dtype(op, name, *z, dtype, "");
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
    check_rank(op, "cu_seqlens", *cu_seqlens, 1, "[N + 1]");
    check_cpu(op, "cu_seqlens", *cu_seqlens);
    check(cu_seqlens->size(0) > 0, op, "expected cu_seqlens of shape [N + 1], got [0]");
    check(B == 1, op, "expected B = 1 with cu_seqlens, got ", B);
    const bool wide = cu_seqlens->scalar_type() == ScalarType::Long;
    check(wide || cu_seqlens->scalar_type() == ScalarType::Int, op, "expected cu_seqlens of dtype int32 or int64, got ",
          dtype_name(cu_seqlens->scalar_type()));
    in.starts = wide ? starts_of<int64_t>(op, *cu_seqlens, T) : starts_of<int32_t>(op, *cu_seqlens, T);
    p.starts = in.starts.data();
    p.sequences = int64_t(in.starts.size()) - 1;
  }
  if (g) {
    p.gate = gate_of(op, *g, B, T, HV, K);
    in.g = torch::stable::to(*g, state_dtype(q.scalar_type()));
    if (p.gate == Gate::channel) in.g = readable(*in.g);
    const auto s = in.g->strides();
    p.g.data = in.g->data_ptr();
    if (p.gate == Gate::head) {
      p.g.head = s[0];
    } else {
      p.g = rows_of(*in.g);
    }
    p.g.element = element_of(in.g->scalar_type());
  }
  p.form = form_of(op, options.form, in);
  check_state(op, "initial_state", initial_state, initial_z, in, options);
  if (initial_z) in.initial_z = torch::stable::contiguous(*initial_z);
  p.initial = states_of(in.initial_state, in.initial_z, options.state_v_first);
  p.q = rows_of(in.q), p.k = rows_of(in.k), p.v = rows_of(in.v);
  return in;
}

Tensor new_state(const Inputs& in, bool v_first) {
  const Problem& p = in.problem;
  return torch::stable::new_empty(in.q, {p.sequences, p.HV, v_first ? p.V : p.K, v_first ? p.K : p.V},
                                  state_dtype(in.q.scalar_type()));
}

Tensor new_z(const Inputs& in) {
  const Problem& p = in.problem;
  return torch::stable::new_empty(in.q, {p.sequences, p.HV, p.K}, state_dtype(in.q.scalar_type()));
}

Tensor none_like(const Inputs& in) {
  return torch::stable::new_empty(in.q, {0}, state_dtype(in.q.scalar_type()));
}

int64_t state_slots(const Inputs& in) {
  return in.B * in.problem.T / kSegment + in.problem.sequences;
}

Tensor new_kept_states(const Inputs& in) {
  const Problem& p = in.problem;
  Tensor states = in_huge_pages(
      torch::stable::new_empty(in.q, {state_slots(in), p.HV, p.K, p.V + p.normalize}, state_dtype(in.q.scalar_type())));
  // The count of slots is an upper bound that depends on shapes only: those that no token fills are zeroed here.
  const size_t slot = size_t(p.HV * p.K * (p.V + p.normalize)) * (in.q.scalar_type() == ScalarType::Double ? 8 : 4);
  char* data = static_cast<char*>(states.data_ptr());
  const auto clear = [&](int64_t from, int64_t to) {
    std::memset(data + size_t(from) * slot, 0, size_t(to - from) * slot);
  };
  int64_t filled = 0;
  for (int64_t n = 0; n < p.sequences; ++n) {
    const int64_t start = p.starts ? p.starts[n] : n * p.T, end = p.starts ? p.starts[n + 1] : start + p.T;
    const int64_t first = start / kSegment + n;
    clear(filled, first);
    filled = first + (end - start + kSegment - 1) / kSegment;
  }
  clear(filled, state_slots(in));
  return states;
}

void split_columns(Problem& p, int64_t tasks) {
  constexpr int64_t narrowest = 32;
  const int64_t heads = std::max<int64_t>(p.sequences * p.HV, 1);
  const int64_t tiles = std::clamp<int64_t>(tasks / heads, 1, std::max<int64_t>(p.V / narrowest, 1));
  p.tile_width = tiles == 1 ? p.V : (p.V + tiles * narrowest - 1) / (tiles * narrowest) * narrowest;
  p.tiles = p.V == 0 ? 1 : (p.V + p.tile_width - 1) / p.tile_width;
}

void run_forward(const ForwardArgs& args) {
  const Problem& p = args.p;
  const double tokens = double(p.T) / (p.starts ? double(std::max<int64_t>(p.sequences, 1)) : 1.0);
  parallel_tasks(p.sequences * p.tiles * p.HV, (tokens + 1) * 4 * double(p.K) * double(p.tile_width + 1),
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
  Tensor final_state = output_final_state ? new_state(in, state_v_first) : none_like(in);
  Tensor final_z = output_final_state && normalize ? new_z(in) : none_like(in);
  Tensor states = keep_states ? new_kept_states(in) : none_like(in);

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
    check_floating(op, "g", *g);
    check_cpu(op, "g", *g);
    gr = readable(torch::stable::to(*g, dtype));
    args.g = {gr->data_ptr(), 0, 0, 0, element_of(dtype)};
    if (g->dim() == 1) {
      check_shape(op, "g", *g, {HV}, "[HV]", "v");
      args.gate = Gate::head;
      args.g.head = gr->stride(0);
    } else if (g->dim() == 2) {
      check_shape(op, "g", *g, {B, HV}, "[B, HV]", "v");
      args.gate = Gate::token;
      args.g.batch = gr->stride(0), args.g.head = gr->stride(1);
    } else {
      check_rank(op, "g", *g, 3, "[HV], [B, HV] or [B, HV, K]");
      check_shape(op, "g", *g, {B, HV, K}, "[B, HV, K]", "q and v");
      args.gate = Gate::channel;
      args.g.batch = gr->stride(0), args.g.head = gr->stride(1);
    }
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
