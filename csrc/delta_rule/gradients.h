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

  // The same from their transposes of `columns` rows.
  void carry_from_transposed(const Problem& p, int64_t columns, const T* ST, const T* dST) {
    Vec<T> total = zero<T>();
    for (int64_t j = 0; j < Kp; j += kLanes<T>) {
      Vec<T> sum = zero<T>();
      for (int64_t v = 0; v < columns; ++v) sum = fma(load(ST + v * Kp + j), load(dST + v * Kp + j), sum);
      fastweights::FW_LEVEL::store(carry + j, sum);
      total += sum;
    }
    if (p.gate != Gate::channel) carry[0] = reduce_add<T>(total);
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

// The gradients of a chunk's own rows and gates.
template <typename T>
class RowGradients {
 public:
  static size_t bytes(const Problem& p, int64_t columns) {
    const int64_t cp = padded<T>(chunk_of(p));
    return 2 * Scratch::take_bytes<T>(width(p, columns)) + 4 * Scratch::take_bytes<T>(cp * L) +
           6 * Scratch::take_bytes<T>(cp);
  }

  RowGradients(const Problem& p, int64_t columns, Scratch& scratch) {
    const int64_t cp = padded<T>(chunk_of(p));
    row = scratch.take<T>(width(p, columns)), other = scratch.take<T>(width(p, columns));
    for (T*& x : parts) x = scratch.take<T>(cp * L);
    q_dq = scratch.take<T>(cp), k_de = scratch.take<T>(cp), k_dk = scratch.take<T>(cp), v_du = scratch.take<T>(cp);
    dg = scratch.take<T>(cp), given = scratch.take<T>(cp);
  }

  // The dot products of each token that the gradients of norms, beta and a scalar gate are made of: of q and dq, of
  // k and erase * de, of k and dk, of v and write * du.
  void products(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t start, int64_t n,
                const Chunk<T>& chunk, const T* dq, const T* de, const T* dk, const T* du) {
    const Problem& p = a.p;
    const int64_t Kp = chunk.Kp, columns = padded<T>(task.width);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * Kp, t = start + i;
      const T *k = chunk.k + at, *erased = k;
      if (p.erase.data) {
        load_row(p.erase, s.offset(p.erase, t, task.head), p.K, T(1), row);
        scale_elements(1, Kp, k, row, row);
        erased = row;
      }
      store_part(0, i, product_sums(chunk.q + at, dq + at, Kp));
      store_part(1, i, product_sums(erased, de + at, Kp));
      store_part(2, i, product_sums(k, dk + at, Kp));
      load_value(p, s, task, t, T(1), row, other, columns);
      store_part(3, i, product_sums(row, du + i * chunk.ld, columns));
    }
    for (int64_t i = 0; i < n; i += L) {
      fastweights::FW_LEVEL::store(q_dq + i, reduce_each<T>(parts[0] + i * L));
      fastweights::FW_LEVEL::store(k_de + i, reduce_each<T>(parts[1] + i * L));
      fastweights::FW_LEVEL::store(k_dk + i, reduce_each<T>(parts[2] + i * L));
      fastweights::FW_LEVEL::store(v_du + i, reduce_each<T>(parts[3] + i * L));
    }
  }

  // dg of a gate per token or head; `products` before it.
  void scalar_gate(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t start, int64_t n,
                   const Chunk<T>& chunk, GateSums<T>& sums) {
    const Problem& p = a.p;
    T gradient = sums.carry[0];
    for (int64_t i = n - 1; i >= 0; --i) {
      gradient += q_dq[i] - chunk.beta[i] * k_de[i] - k_dk[i];
      dg[i] = chunk.decay[i] == T(0) ? T(0) : gradient;
    }
    if (p.gate == Gate::head) {
      for (int64_t i = n - 1; i >= 0; --i) sums.head[0] += dg[i];
      return;
    }
    if (p.decay != Decay::given) through_decay(p, s, task, start, n, sums);
    for (int64_t i = 0; i < n; ++i) static_cast<T*>(a.dg.data)[s.offset(a.dg, start + i, partial(a, task))] = dg[i];
  }

  // What is left: through norms, erase, write and beta to what the caller gave. `products` before it; writes over dq,
  // de, dk and du.
  void store(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t start, int64_t n,
             const Chunk<T>& chunk, T* dq, T* de, T* dk, T* du) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = start + i, at = i * chunk.Kp;
      of_query(a, s, task, t, chunk.q_inverse[i], q_dq[i], chunk.q + at, dq + at);
      of_key(a, s, task, t, chunk.beta[i], chunk.k_inverse[i], k_dk[i] - chunk.beta[i] * k_de[i], chunk.k + at, de + at,
             dk + at);
      of_value(a, s, task, t, chunk.beta[i], du + i * chunk.ld);
    }
    if (!a.dbeta.data) return;
    for (int64_t i = 0; i < n; ++i)
      static_cast<T*>(a.dbeta.data)[s.offset(a.dbeta, start + i, partial(a, task))] =
          (v_du[i] - k_de[i]) * beta_slope(a.p, chunk.beta[i]);
  }

 private:
  static constexpr int L = kLanes<T>;
  T *row, *other, *parts[4], *q_dq, *k_de, *k_dk, *v_du, *dg, *given;

  static int64_t width(const Problem& p, int64_t columns) { return padded<T>(p.K > columns ? p.K : columns); }
  static int64_t partial(const BackwardArgs& a, const Task& task) { return task.tile * a.p.HV + task.head; }

  void store_part(int which, int64_t i, Vec<T> sum) { fastweights::FW_LEVEL::store(parts[which] + i * L, sum); }

  void through_decay(const Problem& p, const Sequence& s, const Task& task, int64_t start, int64_t n,
                     GateSums<T>& sums) {
    const GateOf<T> gate = GateOf<T>::of(p, task.head);
    for (int64_t i = 0; i < padded<T>(n); ++i) {
      given[i] = i < n ? static_cast<const T*>(p.g.data)[s.offset(p.g, start + i, task.head)] : T(0);
      if (i >= n) dg[i] = T(0);
    }
    Vec<T> to_A_log = zero<T>(), to_bias = zero<T>();
    for (int64_t i = 0; i < n; i += L) {
      Vec<T> gradient = load(dg + i);
      to_A_log += gate.backward(load(given + i), 0, 1, gradient);
      to_bias += gradient;
      fastweights::FW_LEVEL::store(dg + i, gradient);
    }
    sums.A_log[0] += reduce_add<T>(to_A_log);
    sums.bias[0] += reduce_add<T>(to_bias);
  }

  // y is x through the norm, perhaps with a scale; along = y . dy.
  void of_query(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t t, T inverse, T along, const T* q,
                T* dq) {
    const Problem& p = a.p;
    const T scale = T(p.scale);
    scale_row(dq, padded<T>(p.K), scale * inverse);
    // q is scale times a row of length one.
    if (p.l2norm && scale != T(0)) subtract(padded<T>(p.K), inverse * along / scale, q, dq);
    store_row(a.dq, s.offset(a.dq, t, partial(a, task)), p.K, dq);
  }

  // e = -beta (erase * k).
  void of_key(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t t, T beta, T inverse, T along,
              const T* k, T* de, T* dk) {
    const Problem& p = a.p;
    const int64_t Kp = padded<T>(p.K);
    if (p.erase.data) {
      load_row(p.erase, s.offset(p.erase, t, task.head), p.K, T(1), row);
      for (int64_t j = 0; j < Kp; j += L) {
        const Vec<T> gradient = load(de + j) * set1(-beta);
        fastweights::FW_LEVEL::store(dk + j, fma(gradient, load(row + j), load(dk + j)));
        fastweights::FW_LEVEL::store(de + j, gradient * load(k + j));
      }
      store_row(a.derase, s.offset(a.derase, t, partial(a, task)), p.K, de);
    } else {
      subtract(Kp, beta, de, dk);
    }
    if (p.l2norm) {
      subtract(Kp, along, k, dk);
      scale_row(dk, Kp, inverse);
    }
    store_row(a.dk, s.offset(a.dk, t, partial(a, task)), p.K, dk);
  }

  // u = beta (write * v).
  void of_value(const BackwardArgs& a, const Sequence& s, const Task& task, int64_t t, T beta, T* du) {
    const Problem& p = a.p;
    scale_row(du, task.width, beta);
    if (p.write.data) {
      load_row(p.v, s.offset(p.v, t, task.head) + task.column, task.width, T(1), row);
      load_row(p.write, s.offset(p.write, t, task.head) + task.column, task.width, T(1), other);
      for (int64_t j = 0; j < task.width; j += L) {
        const Vec<T> gradient = load(du + j);
        fastweights::FW_LEVEL::store(du + j, gradient * load(other + j));
        fastweights::FW_LEVEL::store(row + j, gradient * load(row + j));
      }
      store_row(a.dwrite, s.offset(a.dwrite, t, task.head) + task.column, task.width, row);
    }
    store_row(a.dv, s.offset(a.dv, t, task.head) + task.column, task.width, du);
  }

  // y -= factor x
  static void subtract(int64_t n, T factor, const T* x, T* y) {
    for (int64_t j = 0; j < n; j += L)
      fastweights::FW_LEVEL::store(y + j, fma(set1(-factor), load(x + j), load(y + j)));
  }
};

}  // namespace fastweights::delta_rule::FW_LEVEL
