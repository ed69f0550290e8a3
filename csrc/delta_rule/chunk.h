// A chunk of n tokens of one head: its rows packed, its gates as running products, its corrections.
#pragma once

#include "core/decay.h"
#include "delta_rule/recurrent.h"

namespace fastweights::delta_rule::FW_LEVEL {

// Longest chunks: short ones do less arithmetic above the diagonal; with a gate per channel the diagonal block has no
// matrix form.
constexpr int64_t kChunk = 32;
constexpr int64_t kChannelChunk = 16;

FW_INLINE int64_t chunk_of(const Problem& p) {
  return p.gate == Gate::channel ? kChannelChunk : kChunk;
}

template <typename T>
struct Chunk {
  int64_t Kp, ld, cp;        // padded K, columns and tokens
  T *q, *k, *e, *u;          // rows; q with the scale
  T *q_inverse, *k_inverse;  // inverse norms
  T* beta;
  // Per token, or with a gate per channel per token and channel (rows of Kp): the decay of the token, the decays from
  // the chunk's start through it, and after it to the chunk's end.
  T *decay, *prefix, *suffix;
  T *q_in, *e_in, *k_out;  // q and e times prefix, k times suffix; without a gate q, e and k themselves
  T* total;                // the decay of the whole chunk: one number, or per channel
  T *kT, *part, *room;

  static size_t bytes(const Problem& p, int64_t columns) {
    const int64_t c = chunk_of(p), Kp = padded<T>(p.K), cp = padded<T>(c), per_token = gate_width(p);
    const auto take = [](int64_t n) { return Scratch::take_bytes<T>(n); };
    return 6 * take(cp * Kp) + take(cp * padded<T>(columns)) + 3 * take(c) + 3 * take(c * per_token + kLanes<T>) +
           take(Kp) + take(Kp * cp) + take(cp * kLanes<T>) + take(padded<T>(columns));
  }

  Chunk(const Problem& p, int64_t columns, Scratch& scratch) {
    const int64_t c = chunk_of(p), per_token = gate_width(p);
    Kp = padded<T>(p.K), ld = padded<T>(columns), cp = padded<T>(c);
    q = scratch.take<T>(cp * Kp), k = scratch.take<T>(cp * Kp), e = scratch.take<T>(cp * Kp);
    u = scratch.take<T>(cp * ld);
    q_inverse = scratch.take<T>(c), k_inverse = scratch.take<T>(c), beta = scratch.take<T>(c);
    decay = scratch.take<T>(c * per_token + kLanes<T>);
    prefix = scratch.take<T>(c * per_token + kLanes<T>);
    suffix = scratch.take<T>(c * per_token + kLanes<T>);
    T *scaled_q = scratch.take<T>(cp * Kp), *scaled_e = scratch.take<T>(cp * Kp), *scaled_k = scratch.take<T>(cp * Kp);
    const bool plain = p.gate == Gate::none;
    q_in = plain ? q : scaled_q, e_in = plain ? e : scaled_e, k_out = plain ? k : scaled_k;
    total = scratch.take<T>(Kp);
    kT = scratch.take<T>(Kp * cp);
    part = scratch.take<T>(cp * kLanes<T>);
    room = scratch.take<T>(ld);
  }

  // Tokens [start, start + n), the queries and values only if wanted. Rows of k from n on up to a whole vector are
  // zero, for their transpose.
  void load(const Problem& p, const Sequence& s, const Task& task, int64_t start, int64_t n, bool queries,
            bool values) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = start + i;
      beta[i] = load_beta<T>(p, s.offset(p.beta, t, task.head));
      if (queries) q_inverse[i] = load_normalized(p, p.q, s.offset(p.q, t, task.key_head), T(p.scale), q + i * Kp);
      k_inverse[i] = load_normalized(p, p.k, s.offset(p.k, t, task.key_head), T(1), k + i * Kp);
      load_erase_key(p, s.offset(p.erase, t, task.head), beta[i], k + i * Kp, e + i * Kp);
      if (values) load_value(p, s, task, t, beta[i], u + i * ld, room, ld);
    }
    for (int64_t i = n * Kp; i < padded<T>(n) * Kp; ++i) k[i] = T(0);
    total[0] = T(1);
    if (p.gate == Gate::none) return;
    for (int64_t i = 0; i < n; ++i) load_decay(p, s, start + i, task.head, decay + i * gate_width(p));
    if (p.gate == Gate::channel) {
      running_products(n, Kp, decay, prefix, suffix, total);
      if (queries) scale_elements(n, Kp, prefix, q, q_in);
      scale_elements(n, Kp, prefix, e, e_in);
      scale_elements(n, Kp, suffix, k, k_out);
    } else {
      total[0] = running_products(n, decay, prefix, suffix);
      if (queries) scale_rows(n, Kp, prefix, q, q_in);
      scale_rows(n, Kp, prefix, e, e_in);
      scale_rows(n, Kp, suffix, k, k_out);
    }
  }

  // W = the lower triangle of rows k^T with the decays between the two tokens, in cp x cp; `transpose_keys` before it.
  // With a gate per channel it comes out transposed.
  void transpose_keys(const Problem& p, int64_t n) {
    if (p.gate != Gate::channel) transpose(padded<T>(n), Kp, k, Kp, kT, cp);
  }
  void weights(const Problem& p, int64_t n, const T* rows, T* W) const {
    if (p.gate == Gate::channel) {
      channel_triangle(n, Kp, rows, k, decay, W, cp, part);
    } else {
      triangle<T>(n, p.K, {rows, Kp, 1}, {kT, cp}, W, cp);
      if (p.gate != Gate::none) decay_triangle(n, decay, W, cp);
    }
  }
  Left<T> lower(const Problem& p, const T* W) const {
    return p.gate == Gate::channel ? Left<T>{W, 1, cp} : Left<T>{W, cp, 1};
  }
  Left<T> upper(const Problem& p, const T* W) const {
    return p.gate == Gate::channel ? Left<T>{W, cp, 1} : Left<T>{W, 1, cp};
  }

  // u becomes the corrections N = u + e_in S + strict(L) N.
  template <typename Beside>
  void correct(const Problem& p, int64_t n, const T* L, const T* S, Beside& beside) {
    solve<T>(n, ld, p.K, {e_in, Kp, 1}, {S, ld}, lower(p, L), u, ld, beside);
  }

 private:
  static int64_t gate_width(const Problem& p) { return p.gate == Gate::channel ? padded<T>(p.K) : 1; }
};

// S <- total S + k_out^T N, for the chunk's state before and the one after it, perhaps the same.
template <typename T, typename Beside>
FW_INLINE void advance_state(const Problem& p, const Chunk<T>& chunk, int64_t n, const T* N, const T* before, T* after,
                             Beside& beside) {
  update<T>(p.K, chunk.ld, n, chunk.total, int64_t(p.gate == Gate::channel), {chunk.k_out, 1, chunk.Kp}, {N, chunk.ld},
            before, after, chunk.ld, beside);
}

}  // namespace fastweights::delta_rule::FW_LEVEL
