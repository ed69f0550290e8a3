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

// What a load is for besides k.
struct Wanted {
  bool q, e, u;
};

template <typename T>
class Chunk {
 public:
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
    return 6 * take(cp * Kp) + take(cp * padded<T>(columns)) + 3 * take(cp) + 3 * take(c * per_token + kLanes<T>) +
           take(Kp) + take(Kp * cp) + take(cp * kLanes<T>) + take(padded<T>(columns));
  }

  Chunk(const Problem& p, int64_t columns, Scratch& scratch) {
    const int64_t c = chunk_of(p), per_token = gate_width(p);
    Kp = padded<T>(p.K), ld = padded<T>(columns), cp = padded<T>(c);
    q = scratch.take<T>(cp * Kp), k = scratch.take<T>(cp * Kp), e = scratch.take<T>(cp * Kp);
    u = scratch.take<T>(cp * ld);
    q_inverse = scratch.take<T>(cp), k_inverse = scratch.take<T>(cp), beta = scratch.take<T>(cp);
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

  // Tokens [start, start + n). Rows of k from n on up to a whole vector are zero, for their transpose.
  void load(const Problem& p, const Sequence& s, const Task& task, int64_t start, int64_t n, Wanted wanted) {
    load_gates(p, s, task, start, n);
    load_rows(p, s, p.k, task.key_head, start, n, T(1), k, k_inverse);
    for (int64_t i = n * Kp; i < padded<T>(n) * Kp; ++i) k[i] = T(0);
    scale(p, n, suffix, k, k_out);
    if (wanted.e) {
      for (int64_t i = 0; i < n; ++i)
        load_erase_key(p, s.offset(p.erase, start + i, task.head), beta[i], k + i * Kp, e + i * Kp);
      scale(p, n, prefix, e, e_in);
    }
    if (wanted.q) {
      load_rows(p, s, p.q, task.key_head, start, n, T(p.scale), q, q_inverse);
      scale(p, n, prefix, q, q_in);
    }
    if (wanted.u) {
      for (int64_t i = 0; i < n; ++i) load_value(p, s, task, start + i, beta[i], u + i * ld, room, ld);
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

  // The numbers of all tokens first, so that each function of them takes whole vectors.
  void load_gates(const Problem& p, const Sequence& s, const Task& task, int64_t start, int64_t n) {
    constexpr int L = kLanes<T>;
    for (int64_t i = 0; i < n; ++i)
      beta[i] = p.beta.data ? static_cast<const T*>(p.beta.data)[s.offset(p.beta, start + i, task.head)] : T(1);
    if (p.beta.data) {
      for (int64_t i = 0; i < n; i += L) store(beta + i, beta_of<T>(p, fastweights::FW_LEVEL::load(beta + i)));
    }
    total[0] = T(1);
    if (p.gate == Gate::none) return;
    const GateOf<T> gate = GateOf<T>::of(p, task.head);
    const T* g = static_cast<const T*>(p.g.data);
    if (p.gate == Gate::channel) {
      for (int64_t i = 0; i < n; ++i)
        load_channel_decay(p, gate, g + s.offset(p.g, start + i, task.head), decay + i * Kp);
      running_products(n, Kp, decay, prefix, suffix, total);
    } else {
      for (int64_t i = 0; i < n; ++i) decay[i] = g[s.offset(p.g, start + i, task.head)];
      for (int64_t i = 0; i < n; i += L) store(decay + i, exp(gate(fastweights::FW_LEVEL::load(decay + i), 0, 1)));
      total[0] = running_products(n, decay, prefix, suffix);
    }
  }

  // Rows of q or k, divided by their norms if asked, times factor.
  void load_rows(const Problem& p, const Sequence& s, const Rows& r, int64_t head, int64_t start, int64_t n, T factor,
                 T* out, T* inverse) {
    constexpr int L = kLanes<T>;
    const T first = p.l2norm ? T(1) : factor;
    for (int64_t i = 0; i < n; ++i) load_row(r, s.offset(r, start + i, head), p.K, first, out + i * Kp);
    for (int64_t i = 0; i < n; ++i) inverse[i] = T(1);
    if (!p.l2norm) return;
    for (int64_t i = 0; i < n; ++i) store(part + i * L, product_sums(out + i * Kp, out + i * Kp, Kp));
    for (int64_t i = 0; i < n; i += L) store(inverse + i, reduce_each<T>(part + i * L) + kNormEps<T>);
    for (int64_t i = 0; i < n; ++i) inverse[i] = reciprocal_root(inverse[i]);
    for (int64_t i = 0; i < n; ++i) scale_row(out + i * Kp, Kp, inverse[i] * factor);
  }

  void scale(const Problem& p, int64_t n, const T* factor, const T* in, T* out) const {
    if (p.gate == Gate::channel) {
      scale_elements(n, Kp, factor, in, out);
    } else if (p.gate != Gate::none) {
      scale_rows(n, Kp, factor, in, out);
    }
  }
};

// S <- total S + k_out^T N, for the chunk's state before and the one after it, perhaps the same.
template <typename T, typename Beside>
FW_INLINE void advance_state(const Problem& p, const Chunk<T>& chunk, int64_t n, const T* N, const T* before, T* after,
                             Beside& beside) {
  update<T>(p.K, chunk.ld, n, chunk.total, int64_t(p.gate == Gate::channel), {chunk.k_out, 1, chunk.Kp}, {N, chunk.ld},
            before, after, chunk.ld, beside);
}

}  // namespace fastweights::delta_rule::FW_LEVEL
