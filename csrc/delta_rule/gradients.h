// From the gradients of q, k, e and u, the corrected rows of a chunk, to those of what the caller gave.
#pragma once

#include "delta_rule/chunk.h"

namespace fastweights::delta_rule::FW_LEVEL {

// Gradients that a task sums over its tokens, and what the gate's gradient carries from one chunk to the one before.
template <typename T>
struct GateSums {
  T *carry = nullptr, *bias = nullptr, *A_log = nullptr, *head = nullptr;  // [Kp], [Kp], one, one
  int64_t Kp = 0;

  static int64_t size(int64_t Kp) { return 2 * Kp + 2; }

  GateSums() = default;
  GateSums(T* memory, int64_t width)
      : carry(memory), bias(memory + width), A_log(memory + 2 * width), head(memory + 2 * width + 1), Kp(width) {}

  void clear() {
    for (int64_t j = 0; j < size(Kp); ++j) carry[j] = T(0);
  }

  // carry = dS . S per channel; with a scalar gate their sum is in carry[0].
  void carry_from(const Problem& p, const T* S, const T* dS, int64_t ld) {
    T total = T(0);
    for (int64_t j = 0; j < p.K; ++j) total += carry[j] = dot(S + j * ld, dS + j * ld, ld);
    if (p.gate != Gate::channel) carry[0] = total;
  }

  void store(const BackwardArgs& a, const Task& task) const {
    const Problem& p = a.p;
    const int64_t index = (task.n * p.tiles + task.tile) * p.HV + task.head;
    const int64_t n = p.gate == Gate::channel ? p.K : 1;
    if (p.gate == Gate::head) static_cast<T*>(a.dg.data)[index] = head[0];
    if (a.dA_log) static_cast<T*>(a.dA_log)[index] = A_log[0];
    if (!a.dbias) return;
    for (int64_t j = 0; j < n; ++j) static_cast<T*>(a.dbias)[index * n + j] = bias[j];
  }
};

// dg of the tokens of a chunk. The identity leaves a rounding error where the exact gradient, exp(g) times something,
// is zero.
template <typename T>
FW_INLINE void scalar_gate_gradients(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t start,
                                     int64_t n, const Chunk<T>& chunk, const T* dq, const T* de, const T* dk,
                                     GateSums<T>& sums) {
  const Problem& p = a.p;
  const int64_t Kp = chunk.Kp, partial = task.tile * p.HV + task.head;
  const GateOf<T> gate = GateOf<T>::of(p, task.head);
  T gradient = sums.carry[0];
  for (int64_t i = n - 1; i >= 0; --i) {
    const int64_t at = i * Kp;
    gradient += dot(chunk.q + at, dq + at, Kp) + dot(chunk.e + at, de + at, Kp) - dot(chunk.k + at, dk + at, Kp);
    T exact = chunk.decay[i] == T(0) ? T(0) : gradient;
    if (p.gate == Gate::head) {
      sums.head[0] += exact;
      continue;
    }
    if (p.decay != Decay::given) {
      const T given = static_cast<const T*>(p.g.data)[s.offset(p.g, start + i, task.head)];
      Vec<T> dg = set1(exact);
      sums.A_log[0] += gate.backward(set1(given), 0, 1, dg)[0];
      sums.bias[0] += exact = dg[0];
    }
    static_cast<T*>(a.dg.data)[s.offset(a.dg, start + i, partial)] = exact;
  }
}

template <typename T>
FW_INLINE void channel_gate_gradients(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t start,
                                      int64_t n, const Chunk<T>& chunk, const T* dq, const T* de, const T* dk,
                                      GateSums<T>& sums) {
  constexpr int L = kLanes<T>;
  const Problem& p = a.p;
  const int64_t partial = task.tile * p.HV + task.head;
  const GateOf<T> gate = GateOf<T>::of(p, task.head);
  Vec<T> to_A_log = zero<T>();
  for (int64_t i = n - 1; i >= 0; --i) {
    const T* given = static_cast<const T*>(p.g.data) + s.offset(p.g, start + i, task.head);
    T* out = static_cast<T*>(a.dg.data) + s.offset(a.dg, start + i, partial);
    for (int64_t j = 0; j < p.K; j += L) {
      const int64_t at = i * chunk.Kp + j, lanes = p.K - j < L ? p.K - j : L;
      const Vec<T> gradient = load(sums.carry + j) + load(chunk.q + at) * load(dq + at) +
                              load(chunk.e + at) * load(de + at) - load(chunk.k + at) * load(dk + at);
      store(sums.carry + j, gradient);
      Vec<T> exact = load(chunk.decay + at) == zero<T>() ? zero<T>() : gradient;
      if (p.decay != Decay::given) {
        to_A_log += gate.backward(load_as(given + j, lanes), j, lanes, exact);
        store(sums.bias + j, load(sums.bias + j) + exact);
      }
      store_as(out + j, exact, lanes);
    }
  }
  sums.A_log[0] += reduce_add<T>(to_A_log);
}

// The gradients of a token's own rows; writes over dq, de and dk.
template <typename T>
struct TokenGradients {
  T *row, *other;

  static size_t bytes(const Problem& p, int64_t columns) { return 2 * Scratch::take_bytes<T>(width(p, columns)); }

  TokenGradients(const Problem& p, int64_t columns, Scratch& scratch) {
    row = scratch.take<T>(width(p, columns)), other = scratch.take<T>(width(p, columns));
  }

  void store(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t start, int64_t n,
             const Chunk<T>& chunk, T* dq, T* de, T* dk, T* du) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = start + i;
      of_query(a, s, task, t, chunk.q_inverse[i], dq + i * chunk.Kp);
      T dbeta = of_key(a, s, task, t, chunk.beta[i], chunk.k_inverse[i], chunk.k + i * chunk.Kp, de + i * chunk.Kp,
                       dk + i * chunk.Kp);
      dbeta += of_value(a, s, task, t, chunk.beta[i], du + i * chunk.ld);
      if (a.dbeta.data)
        static_cast<T*>(a.dbeta.data)[s.offset(a.dbeta, t, partial(a, task))] = dbeta * beta_slope(a.p, chunk.beta[i]);
    }
  }

 private:
  static constexpr int L = kLanes<T>;

  static int64_t width(const Problem& p, int64_t columns) { return padded<T>(p.K > columns ? p.K : columns); }
  static int64_t partial(const BackwardArgs& a, const Task& task) { return task.tile * a.p.HV + task.head; }

  void of_query(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t t, T inverse, T* dq) {
    const Problem& p = a.p;
    const int64_t Kp = padded<T>(p.K);
    scale_row(dq, Kp, T(p.scale));
    if (p.l2norm) {
      load_row(p.q, s.offset(p.q, t, task.key_head), p.K, inverse, row);
      normalized_backward(Kp, inverse, row, dq);
    }
    store_row(a.dq, s.offset(a.dq, t, partial(a, task)), p.K, dq);
  }

  // e = -beta (erase * k).
  T of_key(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t t, T beta, T inverse, const T* k, T* de,
           T* dk) {
    const Problem& p = a.p;
    const int64_t Kp = padded<T>(p.K);
    const Vec<T> minus_beta = set1(-beta);
    Vec<T> sum = zero<T>();
    if (p.erase.data) {
      load_row(p.erase, s.offset(p.erase, t, task.head), p.K, T(1), row);
      for (int64_t j = 0; j < Kp; j += L) {
        const Vec<T> gradient = load(de + j), through = load(row + j) * gradient;
        sum = fma(through, load(k + j), sum);
        fastweights::FW_LEVEL::store(dk + j, fma(minus_beta, through, load(dk + j)));
        fastweights::FW_LEVEL::store(de + j, minus_beta * load(k + j) * gradient);
      }
      store_row(a.derase, s.offset(a.derase, t, partial(a, task)), p.K, de);
    } else {
      for (int64_t j = 0; j < Kp; j += L) {
        sum = fma(load(de + j), load(k + j), sum);
        fastweights::FW_LEVEL::store(dk + j, fma(minus_beta, load(de + j), load(dk + j)));
      }
    }
    if (p.l2norm) normalized_backward(Kp, inverse, k, dk);
    store_row(a.dk, s.offset(a.dk, t, partial(a, task)), p.K, dk);
    return -reduce_add<T>(sum);
  }

  // u = beta (write * v).
  T of_value(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t t, T beta, T* du) {
    const Problem& p = a.p;
    Vec<T> sum = zero<T>();
    load_row(p.v, s.offset(p.v, t, task.head) + task.column, task.width, T(1), row);
    if (p.write.data) {
      load_row(p.write, s.offset(p.write, t, task.head) + task.column, task.width, T(1), other);
      for (int64_t j = 0; j < task.width; j += L) {
        const Vec<T> gradient = load(du + j) * load(row + j);
        sum = fma(gradient, load(other + j), sum);
        fastweights::FW_LEVEL::store(du + j, load(du + j) * load(other + j) * set1(beta));
        fastweights::FW_LEVEL::store(row + j, gradient * set1(beta));
      }
      store_row(a.dwrite, s.offset(a.dwrite, t, task.head) + task.column, task.width, row);
    } else {
      for (int64_t j = 0; j < task.width; j += L) sum = fma(load(du + j), load(row + j), sum);
      scale_row(du, task.width, beta);
    }
    store_row(a.dv, s.offset(a.dv, t, task.head) + task.column, task.width, du);
    return reduce_add<T>(sum);
  }
};

}  // namespace fastweights::delta_rule::FW_LEVEL
