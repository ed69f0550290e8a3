// The recurrence token by token: every decode step, sequences too short for chunks, and their backward.
#pragma once

#include "core/scratch.h"
#include "linear_attention/rows.h"

namespace fastweights::linear_attention::FW_LEVEL {

// R rows of S <- a S + k v^T, o += S^T q, in one sweep: v and o are read once for R rows of the state.
template <typename T, int R>
FW_INLINE void advance_rows(int64_t columns, T* S, int64_t ld, const T* q, const T* k, const T* v, const T* a,
                            int64_t a_step, T* o) {
  constexpr int L = kLanes<T>;
  Vec<T> qr[R], kr[R], ar[R];
  FW_UNROLL
  for (int r = 0; r < R; ++r) {
    qr[r] = set1(q[r]);
    kr[r] = set1(k[r]);
    ar[r] = set1(a[r * a_step]);
  }
  for (int64_t j = 0; j < columns; j += L) {
    const Vec<T> value = load(v + j);
    Vec<T> out = load(o + j);
    FW_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<T> s = fma(kr[r], value, load(S + r * ld + j) * ar[r]);
      store(S + r * ld + j, s);
      out = fma(qr[r], s, out);
    }
    store(o + j, out);
  }
}

// a_step 0: one decay for all rows, 1: one each. columns is a multiple of the lane count; o is added to.
template <typename T>
FW_INLINE void advance(int64_t K, int64_t columns, T* S, int64_t ld, const T* q, const T* k, const T* v, const T* a,
                       int64_t a_step, T* o) {
  int64_t i = 0;
  for (; i + 4 <= K; i += 4) advance_rows<T, 4>(columns, S + i * ld, ld, q + i, k + i, v, a + i * a_step, a_step, o);
  for (; i < K; ++i) advance_rows<T, 1>(columns, S + i * ld, ld, q + i, k + i, v, a + i * a_step, a_step, o);
}

// The columns of v that the task does and the normaliser's one, zeros up to ld.
template <typename T>
FW_INLINE void load_value(const Problem& p, const Sequence& s, const Task& task, int64_t i, T* out, int64_t ld) {
  load_row(p.v, s.offset(p.v, i, task.head) + task.column, task.width, T(1), out);
  for (int64_t j = padded<T>(task.width); j < ld; ++j) out[j] = T(0);
  if (p.normalize) out[task.width] = T(1);
}

template <typename T>
static void recurrent_forward(const ForwardArgs& a, int64_t index) {
  const Problem& p = a.p;
  const Task task = Task::of(p, index);
  const Sequence s = Sequence::of(p, task.n);
  const int64_t Kp = padded<T>(p.K), ld = padded<T>(task.columns), a_step = p.gate == Gate::channel;
  Scratch scratch(Scratch::take_bytes<T>(p.K * ld) + 3 * Scratch::take_bytes<T>(Kp) + 2 * Scratch::take_bytes<T>(ld));
  T* S = scratch.take<T>(p.K * ld);
  T *q = scratch.take<T>(Kp), *k = scratch.take<T>(Kp), *decay = scratch.take<T>(Kp);
  T *v = scratch.take<T>(ld), *o = scratch.take<T>(ld);

  load_state(p.initial, task, p.K, p.HV, p.normalize, S, ld);
  for (int64_t i = 0; i < s.length; ++i) {
    if (a.states && i % kSegment == 0) keep_state(a.states, p, task, s.slot + i / kSegment, S, ld);
    load_row(p.q, s.offset(p.q, i, task.key_head), p.K, T(p.scale), q);
    load_row(p.k, s.offset(p.k, i, task.key_head), p.K, T(1), k);
    load_value(p, s, task, i, v, ld);
    load_decay(p, s, i, task.head, decay);
    for (int64_t j = 0; j < ld; ++j) o[j] = T(0);
    advance(p.K, ld, S, ld, q, k, v, decay, a_step, o);
    if (p.normalize) {
      const T inverse = T(1) / (o[task.width] + T(p.eps));
      for (int64_t j = 0; j < task.width; ++j) o[j] *= inverse;
    }
    store_row(a.o, s.offset(a.o, i, task.head) + task.column, task.width, o);
  }
  store_state(a.final, task, p.K, p.HV, p.normalize, S, ld);
}

// The gradient of the numerator and, behind it, of the denominator: do / n and -(do . o) / n. Every tile divides by n;
// the denominator's gradient is the first tile's alone, or it would be counted once per tile.
template <typename T>
FW_INLINE void load_output_gradient(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t i, T n, T* row,
                                    T* out, int64_t ld) {
  const Problem& p = a.p;
  load_row(a.grad_o, s.offset(a.grad_o, i, task.head) + task.column, task.width, T(1), out);
  for (int64_t j = padded<T>(task.width); j < ld; ++j) out[j] = T(0);
  if (!p.normalize) return;
  const T inverse = T(1) / n;
  for (int64_t j = 0; j < task.width; ++j) out[j] *= inverse;
  if (task.tile != 0) return;
  const int64_t Vp = padded<T>(p.V);
  load_row(a.grad_o, s.offset(a.grad_o, i, task.head), p.V, T(1), row);
  load_row(a.o, s.offset(a.o, i, task.head), p.V, T(1), row + Vp);
  out[task.width] = -dot(row, row + Vp, Vp) * inverse;
}

// Sweep 1 runs the recurrence again for dq = S do and leaves q . dq in dg; sweep 2 runs the dual recurrence
// R <- a R + q do^T from the last token for dk = R v, dv = R^T k. Then dg_t = dg_{t+1} + q_t . dq_t - k_t . dk_t with
// dg_{T+1} = dS_T . S_T (per channel, or summed over the channels).
template <typename T>
static void recurrent_backward(const BackwardArgs& a, int64_t index) {
  const Problem& p = a.p;
  const Task task = Task::of(p, index);
  const Sequence s = Sequence::of(p, task.n);
  const int64_t K = p.K, Kp = padded<T>(K), ld = padded<T>(task.columns), Vp = padded<T>(p.V);
  const int64_t partial = task.tile * p.HV + task.head;
  const bool channel = p.gate == Gate::channel, gated = p.gate != Gate::none;
  const int64_t per_token = channel ? Kp : 1;

  Scratch scratch(2 * Scratch::take_bytes<T>(K * ld) + 6 * Scratch::take_bytes<T>(Kp) + 3 * Scratch::take_bytes<T>(ld) +
                  Scratch::take_bytes<T>(2 * Vp) + Scratch::take_bytes<T>(s.length) +
                  Scratch::take_bytes<T>(s.length * per_token));
  T *S = scratch.take<T>(K * ld), *R = scratch.take<T>(K * ld);
  T *q = scratch.take<T>(Kp), *k = scratch.take<T>(Kp), *decay = scratch.take<T>(Kp), *d = scratch.take<T>(Kp);
  T *carry = scratch.take<T>(Kp), *z = scratch.take<T>(Kp);
  T *v = scratch.take<T>(ld), *g_o = scratch.take<T>(ld), *dv = scratch.take<T>(ld);
  T* row = scratch.take<T>(2 * Vp);
  T* denominators = scratch.take<T>(s.length);
  T* q_dq = scratch.take<T>(s.length * per_token);
  for (int64_t j = 0; j < Kp; ++j) d[j] = z[j] = T(0);

  load_state(p.initial, task, K, p.HV, p.normalize, S, ld);
  for (int64_t j = 0; j < K && p.normalize; ++j) z[j] = S[j * ld + task.width];
  for (int64_t i = 0; i < s.length; ++i) {
    load_row(p.q, s.offset(p.q, i, task.key_head), K, T(p.scale), q);
    load_row(p.k, s.offset(p.k, i, task.key_head), K, T(1), k);
    load_value(p, s, task, i, v, ld);
    load_decay(p, s, i, task.head, decay);
    if (p.normalize) {
      for (int64_t j = 0; j < K; ++j) z[j] = z[j] * decay[channel ? j : 0] + k[j];
    }
    denominators[i] = p.normalize ? dot(q, z, Kp) + T(p.eps) : T(1);
    load_output_gradient(a, s, task, i, denominators[i], row, g_o, ld);
    for (int64_t j = 0; j < K; ++j) {
      T* Sj = S + j * ld;
      const Vec<T> aj = set1(decay[channel ? j : 0]), kj = set1(k[j]);
      Vec<T> sum = zero<T>();
      for (int64_t c = 0; c < ld; c += kLanes<T>) {
        const Vec<T> updated = fma(kj, load(v + c), load(Sj + c) * aj);
        store(Sj + c, updated);
        sum = fma(updated, load(g_o + c), sum);
      }
      d[j] = reduce_add<T>(sum);
    }
    if (channel) {
      for (int64_t j = 0; j < K; ++j) q_dq[i * per_token + j] = q[j] * d[j];
    } else if (gated) {
      q_dq[i] = dot(q, d, Kp);
    }
    for (int64_t j = 0; j < K; ++j) d[j] *= T(p.scale);
    store_row(a.dq, s.offset(a.dq, i, partial), K, d);
  }

  load_state(a.grad_final, task, K, p.HV, p.normalize && task.tile == 0, R, ld);
  T total = T(0);
  for (int64_t j = 0; j < K; ++j) {
    carry[j] = dot(R + j * ld, S + j * ld, ld);
    total += carry[j];
  }
  T sum_over_tokens = T(0);
  for (int64_t i = s.length - 1; i >= 0; --i) {
    load_row(p.q, s.offset(p.q, i, task.key_head), K, T(p.scale), q);
    load_row(p.k, s.offset(p.k, i, task.key_head), K, T(1), k);
    load_value(p, s, task, i, v, ld);
    load_decay(p, s, i, task.head, decay);
    load_output_gradient(a, s, task, i, denominators[i], row, g_o, ld);
    for (int64_t c = 0; c < ld; ++c) dv[c] = T(0);
    for (int64_t j = 0; j < K; ++j) {
      T* Rj = R + j * ld;
      const Vec<T> qj = set1(q[j]), kj = set1(k[j]), aj = set1(decay[channel ? j : 0]);
      Vec<T> sum = zero<T>();
      for (int64_t c = 0; c < ld; c += kLanes<T>) {
        const Vec<T> r = fma(qj, load(g_o + c), load(Rj + c));
        sum = fma(r, load(v + c), sum);
        store(dv + c, fma(kj, r, load(dv + c)));
        store(Rj + c, r * aj);
      }
      d[j] = reduce_add<T>(sum);
    }
    store_row(a.dk, s.offset(a.dk, i, partial), K, d);
    store_row(a.dv, s.offset(a.dv, i, task.head) + task.column, task.width, dv);
    if (!gated) continue;
    T* dg = static_cast<T*>(a.dg.data) + s.offset(a.dg, i, partial);
    if (channel) {
      for (int64_t j = 0; j < K; ++j) {
        carry[j] += q_dq[i * per_token + j] - k[j] * d[j];
        dg[j] = decay[j] == T(0) ? T(0) : carry[j];
      }
    } else {
      total += q_dq[i] - dot(k, d, Kp);
      const T gradient = decay[0] == T(0) ? T(0) : total;
      if (p.gate == Gate::token) dg[0] = gradient;
      sum_over_tokens += gradient;
    }
  }
  if (p.gate == Gate::head) static_cast<T*>(a.dg.data)[task.n * a.dg.batch + partial * a.dg.head] = sum_over_tokens;
  store_state(a.grad_initial, task, K, p.HV, p.normalize, R, ld);
}

}  // namespace fastweights::linear_attention::FW_LEVEL
