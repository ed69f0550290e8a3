#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "causal_conv1d/kernel.h"
#include "core/check.h"
#include "core/cpu_level.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "core/recurrence_ops.h"

namespace fastweights::causal_conv1d {
namespace {

// The checked arguments. The tensors are kept because `problem` points into them: those that could not be read in
// place are copies.
struct Inputs {
  Tensor x, weight;
  OptionalTensor bias;
  std::vector<Segment> segments;
  std::vector<Tile> tiles;
  Problem problem;
  int64_t sequences;
};

// Whether time is contiguous and channels are not: functional.py says the same to the compiler.
bool time_is_contiguous(const Tensor& x) {
  return x.stride(1) == 1 && !(x.size(2) > 1 && x.stride(2) == 1);
}

// x itself where it is readable in this memory order, else a copy.
Tensor in_order(const Tensor& x, bool lines) {
  if (!lines) return with_contiguous_last(x);
  if (x.stride(1) == 1) return x;
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(x, 1, 2)), 1, 2);
}

Tensor new_signal(const Tensor& like, const Problem& p) {
  if (!p.lines) return in_huge_pages(torch::stable::new_empty(like, {p.B, p.T, p.D}));
  return torch::stable::transpose(in_huge_pages(torch::stable::new_empty(like, {p.B, p.D, p.T})), 1, 2);
}

Signal signal_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

State state_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

bool silu_of(const char* op, const std::string& activation) {
  check(activation == "silu" || activation == "none", op, "expected activation silu or none, got ", activation);
  return activation == "silu";
}

void check_signal(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_cpu(op, name, t);
  const auto sizes = x.sizes();
  check_shape(op, name, t, {sizes[0], sizes[1], sizes[2]}, "[B, T, D]", "x");
  check_same_dtype(op, name, t, "x", x);
}

void check_state(const char* op, const char* name, const Tensor& t, int64_t N, int64_t D, int64_t W, const Tensor& x) {
  check_cpu(op, name, t);
  check_rank(op, name, t, 3, "[N, D, S]");
  check(t.size(0) == N && t.size(1) == D && t.size(2) >= W - 1, op, "expected ", name, " of shape [N, D, S] = [", N,
        ", ", D, ", at least ", W - 1, "] (from x, weight and cu_seqlens), got ", shape_of(t));
  check_same_dtype(op, name, t, "x", x);
}

// weight as [W, D] and bias, in the type of the arithmetic.
std::tuple<Tensor, OptionalTensor> parameters(const char* op, const Tensor& weight, const OptionalTensor& bias,
                                              const Tensor& x, int64_t D) {
  const ScalarType arithmetic = state_dtype(x.scalar_type());
  check_cpu(op, "weight", weight);
  check_floating(op, "weight", weight);
  check_rank(op, "weight", weight, 2, "[D, W]");
  check(weight.size(0) == D && weight.size(1) > 0, op, "expected weight of shape [D, W] = [", D,
        ", at least 1] (from x), got ", shape_of(weight));
  OptionalTensor converted;
  if (bias) {
    check_cpu(op, "bias", *bias);
    check_floating(op, "bias", *bias);
    check_shape(op, "bias", *bias, {D}, "[D]", "x");
    converted = with_contiguous_last(in_dtype(*bias, arithmetic));
  }
  const Tensor taps = torch::stable::transpose(in_dtype(weight, arithmetic), 0, 1);
  return {torch::stable::contiguous(taps), converted};
}

template <typename Index>
void append_runs(const Tensor& seq_idx, int64_t b, int64_t T, std::vector<Segment>& segments) {
  const Index* index = seq_idx.const_data_ptr<Index>() + b * seq_idx.stride(0);
  const int64_t step = seq_idx.stride(1);
  int64_t begin = 0;
  for (int64_t t = 1; t < T; ++t) {
    if (index[t * step] == index[(t - 1) * step]) continue;
    segments.push_back({b, begin, t, begin == 0 ? b : -1, -1});
    begin = t;
  }
  segments.push_back({b, begin, T, begin == 0 ? b : -1, b});
}

void find_segments(const char* op, const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens, Inputs& in) {
  Problem& p = in.problem;
  check(!seq_idx || !cu_seqlens, op, "expected seq_idx or cu_seqlens, got both");
  in.sequences = p.B;
  if (cu_seqlens) {
    const std::vector<int64_t> starts = starts_of(op, *cu_seqlens, p.B, p.T);
    in.sequences = int64_t(starts.size()) - 1;
    for (int64_t n = 0; n < in.sequences; ++n) in.segments.push_back({0, starts[n], starts[n + 1], n, n});
  } else if (seq_idx) {
    check_cpu(op, "seq_idx", *seq_idx);
    check_shape(op, "seq_idx", *seq_idx, {p.B, p.T}, "[B, T]", "x");
    const bool wide = seq_idx->scalar_type() == ScalarType::Long;
    check(wide || seq_idx->scalar_type() == ScalarType::Int, op, "expected seq_idx of dtype int32 or int64, got ",
          dtype_name(seq_idx->scalar_type()));
    for (int64_t b = 0; b < p.B; ++b) {
      wide ? append_runs<int64_t>(*seq_idx, b, p.T, in.segments) : append_runs<int32_t>(*seq_idx, b, p.T, in.segments);
    }
  } else {
    for (int64_t b = 0; b < p.B; ++b) in.segments.push_back({b, 0, p.T, b, b});
  }
  const int64_t tokens = p.lines ? kLineTokens : kRowTokens, channels = p.lines ? kLineChannels : kRowChannels;
  for (size_t s = 0; s < in.segments.size(); ++s) {
    const Segment& segment = in.segments[s];
    int64_t begin = segment.begin;
    do {
      const int64_t end = std::min(begin + tokens, segment.end);
      in.tiles.push_back({int64_t(s), begin, end});
      begin = end;
    } while (begin < segment.end);
  }
  p.segments = in.segments.data(), p.tiles = in.tiles.data();
  p.tile_count = int64_t(in.tiles.size());
  p.channel_blocks = (p.D + channels - 1) / channels;
}

Inputs check_inputs(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
                    const OptionalTensor& cu_seqlens, const std::string& activation) {
  check_rank(op, "x", x, 3, "[B, T, D]");
  check_floating(op, "x", x);
  check_cpu(op, "x", x);
  const bool lines = time_is_contiguous(x);
  auto [taps, offsets] = parameters(op, weight, bias, x, x.size(2));
  Inputs in{in_order(x, lines), taps, offsets, {}, {}, {}, 0};
  Problem& p = in.problem;
  p.x = signal_of(in.x);
  p.element = element_of(x.scalar_type());
  p.weight = in.weight.data_ptr(), p.bias = in.bias ? in.bias->data_ptr() : nullptr;
  p.silu = silu_of(op, activation), p.lines = lines;
  p.B = x.size(0), p.T = x.size(1), p.D = x.size(2), p.W = weight.size(1), p.S = p.W - 1;
  find_segments(op, seq_idx, cu_seqlens, in);
  if (initial_state) {
    check_state(op, "initial_state", *initial_state, in.sequences, p.D, p.W, x);
    p.S = initial_state->size(2);
    p.initial = state_of(*initial_state);
  }
  return in;
}

// Arithmetic of a task, for the least share of a thread.
double task_flops(const Problem& p) {
  const double tokens = double(p.B * p.T) / double(std::max<int64_t>(p.tile_count, 1));
  return (tokens + 1) * double(std::min(p.D, p.lines ? kLineChannels : kRowChannels)) * (2.0 * double(p.W) + 20);
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& residual, const OptionalTensor& initial_state,
                                         const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
                                         const std::string& activation, bool output_final_state) {
  const char* op = "causal_conv1d";
  const Inputs in = check_inputs(op, x, weight, bias, initial_state, seq_idx, cu_seqlens, activation);
  const Problem& p = in.problem;
  Tensor y = new_signal(x, p);
  ForwardArgs args{p, signal_of(y), {}, {}};
  OptionalTensor added;
  if (residual) {
    check_signal(op, "residual", *residual, x);
    added = in_order(*residual, p.lines);
    args.residual = signal_of(*added);
  }
  Tensor final_state =
      output_final_state ? torch::stable::new_empty(x, {in.sequences, p.D, p.S}) : torch::stable::new_empty(x, {0});
  if (output_final_state) args.final = state_of(final_state);
  parallel_tasks(p.tile_count * p.channel_blocks, task_flops(p),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(forward)(args, begin, end); });
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    const Tensor& grad_y, const OptionalTensor& grad_final_state, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
    const OptionalTensor& cu_seqlens, const std::string& activation) {
  const char* op = "causal_conv1d_backward";
  const Inputs in = check_inputs(op, x, weight, bias, initial_state, seq_idx, cu_seqlens, activation);
  const Problem& p = in.problem;
  check_signal(op, "grad_y", grad_y, x);
  const Tensor dy = in_order(grad_y, p.lines);
  Tensor dx = new_signal(x, p);
  Tensor dinitial = torch::stable::new_empty(x, {0});
  if (initial_state) dinitial = torch::stable::new_empty(x, {in.sequences, p.D, p.S});
  Tensor partial = torch::stable::new_empty(x, {p.tile_count, p.W + 1, p.D}, state_dtype(x.scalar_type()));

  BackwardArgs args{p, signal_of(dy), signal_of(dx), {}, {}, partial.data_ptr()};
  if (initial_state) args.dinitial = state_of(dinitial);
  if (grad_final_state) {
    check_state(op, "grad_final_state", *grad_final_state, in.sequences, p.D, p.S + 1, x);
    check(grad_final_state->size(2) == p.S, op, "expected grad_final_state with S = ", p.S, ", got ",
          shape_of(*grad_final_state));
    args.dfinal = state_of(*grad_final_state);
  }
  parallel_tasks(p.tile_count * p.channel_blocks, 3 * task_flops(p),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(backward)(args, begin, end); });

  Tensor sums = summed_rows(partial, (p.W + 1) * p.D);
  const Tensor taps = torch::stable::reshape(torch::stable::narrow(sums, 0, 0, p.W * p.D), {p.W, p.D});
  const Tensor dweight = torch::stable::contiguous(torch::stable::transpose(taps, 0, 1));
  Tensor dbias = torch::stable::new_empty(x, {0});
  if (bias) {
    const Tensor last = torch::stable::narrow(sums, 0, p.W * p.D, p.D);
    dbias = torch::stable::to(torch::stable::clone(last), bias->scalar_type());
  }
  return {dx, torch::stable::to(dweight, weight.scalar_type()), dbias, dinitial};
}

// One integer for each batch entry; none where the tensor is absent.
std::vector<int64_t> integers_of(const char* op, const char* name, const OptionalTensor& t, int64_t B) {
  if (!t) return {};
  check_cpu(op, name, *t);
  check_shape(op, name, *t, {B}, "[B]", "x");
  check(t->scalar_type() == ScalarType::Int || t->scalar_type() == ScalarType::Long, op, "expected ", name,
        " of dtype int32 or int64, got ", dtype_name(t->scalar_type()));
  const Tensor wide = in_dtype(*t, ScalarType::Long);
  std::vector<int64_t> values(B);
  for (int64_t b = 0; b < B; ++b) values[b] = wide.const_data_ptr<int64_t>()[b * wide.stride(0)];
  return values;
}

// Raises unless each batch entry has a row of its own among the N of the state: two writers of one row would race.
void check_rows(const char* op, const std::vector<int64_t>& rows, int64_t N) {
  std::vector<bool> taken(N);
  for (int64_t row : rows) {
    check(row >= 0 && row < N, op, "expected conv_state_indices in [0, N) = [0, ", N, ") (from state), got ", row);
    check(!taken[row], op, "expected conv_state_indices to differ, got ", row, " twice");
    taken[row] = true;
  }
}

Tensor causal_conv1d_update(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, Tensor state, const OptionalTensor& cache_seqlens,
                            const OptionalTensor& conv_state_indices, const std::string& activation) {
  const char* op = "causal_conv1d_update";
  check(x.dim() == 2 || x.dim() == 3, op, "expected x of shape [B, D] or [B, L, D], got ", shape_of(x));
  check_floating(op, "x", x);
  check_cpu(op, "x", x);
  const bool one = x.dim() == 2;
  const int64_t B = x.size(0), L = one ? 1 : x.size(1), D = x.size(one ? 1 : 2);
  const auto [taps, offsets] = parameters(op, weight, bias, x, D);
  const int64_t N = conv_state_indices && state.dim() == 3 ? state.size(0) : B;
  check_state(op, "state", state, N, D, weight.size(1), x);
  const std::vector<int64_t> rows = integers_of(op, "conv_state_indices", conv_state_indices, B);
  if (conv_state_indices) check_rows(op, rows, N);
  std::vector<int64_t> slots = integers_of(op, "cache_seqlens", cache_seqlens, B);
  for (int64_t& slot : slots) {
    check(slot >= 0, op, "expected cache_seqlens of at least 0, got ", slot);
    slot %= std::max<int64_t>(state.size(2), 1);
  }
  const auto signal = [&](const Tensor& t) { return Signal{t.data_ptr(), t.stride(0), one ? 0 : t.stride(1), 1}; };
  const Tensor read = with_contiguous_last(x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  UpdateArgs args{};
  args.x = signal(read), args.y = signal(y);
  OptionalTensor added;
  if (residual) {
    check_cpu(op, "residual", *residual);
    one ? check_shape(op, "residual", *residual, {B, D}, "[B, D]", "x")
        : check_shape(op, "residual", *residual, {B, L, D}, "[B, L, D]", "x");
    check_same_dtype(op, "residual", *residual, "x", x);
    added = with_contiguous_last(*residual);
    args.residual = signal(*added);
  }
  args.element = element_of(x.scalar_type());
  args.weight = taps.data_ptr(), args.bias = offsets ? offsets->data_ptr() : nullptr;
  args.silu = silu_of(op, activation);
  args.L = L, args.D = D, args.W = weight.size(1), args.S = state.size(2);
  args.channel_blocks = (D + kRowChannels - 1) / kRowChannels;
  args.state = state_of(state);
  args.rows = conv_state_indices ? rows.data() : nullptr, args.slots = cache_seqlens ? slots.data() : nullptr;
  parallel_tasks(B * args.channel_blocks, double(L * std::min(D, kRowChannels)) * (2.0 * double(args.W) + 20),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(update)(args, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? initial_state, "
      "Tensor? seq_idx, Tensor? cu_seqlens, *, str activation, bool output_final_state) "
      "-> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor grad_y, Tensor? grad_final_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, *, str activation) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) state, "
      "Tensor? cache_seqlens, Tensor? conv_state_indices, *, str activation) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
  m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
}

}  // namespace fastweights::causal_conv1d
