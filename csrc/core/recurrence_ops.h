// What the ops of a gated recurrence check, lay out and allocate alike.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/cpu_level.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "core/recurrence.h"

namespace fastweights {

using OptionalTensor = std::optional<Tensor>;

inline Rows rows_of(const Tensor& t) {
  const auto strides = t.strides();
  return {t.data_ptr(), strides[0], strides[1], strides[2], element_of(t.scalar_type())};
}

// A state [N, HV, K, V] (or [N, HV, V, K]) and its z; either may be absent.
inline States states_of(const OptionalTensor& S, const OptionalTensor& z, bool v_first) {
  States states;
  if (S) {
    const auto strides = S->strides();
    states = {S->data_ptr(), strides[0], strides[1], strides[v_first ? 3 : 2], strides[v_first ? 2 : 3], nullptr};
  }
  if (z) states.z = z->data_ptr();
  return states;
}

inline Gate gate_of(const char* op, const Tensor& g, int64_t B, int64_t T, int64_t HV, int64_t K) {
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

// The gates of a step, without time.
inline Gate step_gate_of(const char* op, const Tensor& g, int64_t B, int64_t HV, int64_t K) {
  check_floating(op, "g", g);
  check_cpu(op, "g", g);
  switch (g.dim()) {
    case 1:
      check_shape(op, "g", g, {HV}, "[HV]", "v");
      return Gate::head;
    case 2:
      check_shape(op, "g", g, {B, HV}, "[B, HV]", "v");
      return Gate::token;
    default:
      check_rank(op, "g", g, 3, "[HV], [B, HV] or [B, HV, K]");
      check_shape(op, "g", g, {B, HV, K}, "[B, HV, K]", "q and v");
      return Gate::channel;
  }
}

// g as the kernels read it: in the type of the arithmetic, a gate per channel with a contiguous last dimension.
inline Tensor readable_gate(const Tensor& g, Gate gate, ScalarType arithmetic) {
  const Tensor converted = in_dtype(g, arithmetic);
  return gate == Gate::channel ? with_contiguous_last(converted) : converted;
}

inline Rows rows_of_gate(const Tensor& g, Gate gate) {
  if (gate != Gate::head) return rows_of(g);
  return {g.data_ptr(), 0, 0, g.stride(0), element_of(g.scalar_type())};
}

template <typename Index>
std::vector<int64_t> ascending_starts(const char* op, const Tensor& cu_seqlens, int64_t T) {
  const Index* values = cu_seqlens.const_data_ptr<Index>();
  std::vector<int64_t> starts(cu_seqlens.size(0));
  for (size_t i = 0; i < starts.size(); ++i) starts[i] = values[i * cu_seqlens.stride(0)];
  check(starts.front() == 0, op, "expected cu_seqlens to begin with 0, got ", starts.front());
  for (size_t i = 1; i < starts.size(); ++i)
    check(starts[i - 1] <= starts[i], op, "expected cu_seqlens to ascend, got ", starts[i], " after ", starts[i - 1]);
  check(starts.back() == T, op, "expected cu_seqlens to end with T = ", T, ", got ", starts.back());
  return starts;
}

inline std::vector<int64_t> starts_of(const char* op, const Tensor& cu_seqlens, int64_t B, int64_t T) {
  check_rank(op, "cu_seqlens", cu_seqlens, 1, "[N + 1]");
  check_cpu(op, "cu_seqlens", cu_seqlens);
  check(cu_seqlens.size(0) > 0, op, "expected cu_seqlens of shape [N + 1], got [0]");
  check(B == 1, op, "expected B = 1 with cu_seqlens, got ", B);
  const bool wide = cu_seqlens.scalar_type() == ScalarType::Long;
  check(wide || cu_seqlens.scalar_type() == ScalarType::Int, op, "expected cu_seqlens of dtype int32 or int64, got ",
        dtype_name(cu_seqlens.scalar_type()));
  return wide ? ascending_starts<int64_t>(op, cu_seqlens, T) : ascending_starts<int32_t>(op, cu_seqlens, T);
}

inline double tokens_per_sequence(const Recurrence& p) {
  return double(p.T) / (p.starts ? double(std::max<int64_t>(p.sequences, 1)) : 1.0);
}

// Sequences shorter than `shortest` on average run token by token.
inline Form form_of(const char* op, const std::string& form, const Recurrence& p, int64_t shortest = 16) {
  if (form == "recurrent") return Form::recurrent;
  if (form == "chunked") return Form::chunked;
  check(form == "auto", op, "expected form of auto, recurrent or chunked, got ", form);
  return tokens_per_sequence(p) < double(shortest) ? Form::recurrent : Form::chunked;
}

// Raises unless S, where given, fits the inputs, whose queries are `like`.
inline void check_state(const char* op, const char* name, const OptionalTensor& S, const Recurrence& p,
                        const Tensor& like, bool v_first) {
  if (!S) return;
  check_cpu(op, name, *S);
  check_shape(op, name, *S, {p.sequences, p.HV, v_first ? p.V : p.K, v_first ? p.K : p.V},
              v_first ? "[N, HV, V, K]" : "[N, HV, K, V]", "q, v and cu_seqlens");
  check_dtype(op, name, *S, state_dtype(like.scalar_type()), "");
}

inline Tensor new_state(const Tensor& like, const Recurrence& p, bool v_first) {
  return torch::stable::new_empty(like, {p.sequences, p.HV, v_first ? p.V : p.K, v_first ? p.K : p.V},
                                  state_dtype(like.scalar_type()));
}

// An absent output.
inline Tensor none_like(const Tensor& like) {
  return torch::stable::new_empty(like, {0}, state_dtype(like.scalar_type()));
}

// Slots of the states that a forward keeps: sequence n, whose first token is number t0 of all tokens, has its own from
// slot t0 / kSegment + n on.
inline int64_t state_slots(const Recurrence& p) {
  return (p.starts ? p.T : p.sequences * p.T) / kSegment + p.sequences;
}

inline Tensor new_kept_states(const Tensor& like, const Recurrence& p) {
  const ScalarType dtype = state_dtype(like.scalar_type());
  Tensor states = in_huge_pages(torch::stable::new_empty(like, {state_slots(p), p.HV, p.K, p.V + p.normalize}, dtype));
  // The count of slots is an upper bound that depends on shapes only: those that no token fills are zeroed here.
  const size_t slot = size_t(p.HV * p.K * (p.V + p.normalize)) * (dtype == ScalarType::Double ? 8 : 4);
  char* data = static_cast<char*>(states.data_ptr());
  const auto clear = [&](int64_t from, int64_t to) {
    const size_t bytes = size_t(to - from) * slot;
    if (bytes) std::memset(data + size_t(from) * slot, 0, bytes);  // no memory at all is a null pointer
  };
  int64_t filled = 0;
  for (int64_t n = 0; n < p.sequences; ++n) {
    const int64_t start = p.starts ? p.starts[n] : n * p.T, end = p.starts ? p.starts[n + 1] : start + p.T;
    const int64_t first = start / kSegment + n;
    clear(filled, first);
    filled = first + (end - start + kSegment - 1) / kSegment;
  }
  clear(filled, state_slots(p));
  return states;
}

inline void check_kept_states(const char* op, const Tensor& states, const Tensor& like, const Recurrence& p) {
  check_shape(op, "states", states, {state_slots(p), p.HV, p.K, p.V + p.normalize}, "[slots, HV, K, V]", "q and v");
  check_dtype(op, "states", states, state_dtype(like.scalar_type()), "");
  check(states.is_contiguous(), op, "expected states to be contiguous, got strides of a view");
}

// Splits V so that there are about `tasks` tasks, in tiles of at least 32 columns.
inline void split_columns(Recurrence& p, int64_t tasks) {
  constexpr int64_t narrowest = 32;
  const int64_t heads = std::max<int64_t>(p.sequences * p.HV, 1);
  const int64_t tiles = std::clamp<int64_t>(tasks / heads, 1, std::max<int64_t>(p.V / narrowest, 1));
  p.tile_width = tiles == 1 ? p.V : (p.V + tiles * narrowest - 1) / (tiles * narrowest) * narrowest;
  p.tiles = p.V == 0 ? 1 : (p.V + p.tile_width - 1) / p.tile_width;
}

// partial [B, T, tiles * HV, n] summed into the shape and dtype of `like`.
inline Tensor summed_heads(const Tensor& partial, const Tensor& like, const Recurrence& p) {
  Tensor out = torch::stable::new_empty(like, like.sizes());
  const SumHeadsArgs args{rows_of(partial), rows_of(out), p.T, out.size(2), p.HV, out.size(3), p.tiles};
  parallel_tasks(out.size(0) * p.T, double(p.tiles * p.HV * p.K),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(sum_heads)(args, begin, end); });
  return out;
}

// The sum over `rows` rows of contiguous [rows, n], in their order.
template <typename T>
void sum_rows_into(const Tensor& in, int64_t rows, int64_t n, Tensor& out) {
  const T* from = in.const_data_ptr<T>();
  T* sum = out.mutable_data_ptr<T>();
  for (int64_t j = 0; j < n; ++j) sum[j] = T(0);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; ++j) sum[j] += from[i * n + j];
}

inline Tensor summed_rows(const Tensor& in, int64_t n) {
  Tensor out = torch::stable::new_empty(in, {n});
  const int64_t rows = n ? in.numel() / n : 0;
  in.scalar_type() == ScalarType::Double ? sum_rows_into<double>(in, rows, n, out)
                                         : sum_rows_into<float>(in, rows, n, out);
  return out;
}

}  // namespace fastweights
