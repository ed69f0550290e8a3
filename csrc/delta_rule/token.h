// The rows of a token as the recurrence reads them: activations, norms and the products with beta, erase and write.
#pragma once

#include "core/sequence.h"
#include "core/vmath.h"
#include "delta_rule/kernel.h"

namespace fastweights::delta_rule::FW_LEVEL {
using namespace ::fastweights::FW_LEVEL;

// x[0, n) *= factor, up to whole vectors.
template <typename T>
FW_INLINE void scale_row(T* x, int64_t n, T factor) {
  for (int64_t j = 0; j < n; j += kLanes<T>) store(x + j, load(x + j) * set1(factor));
}

template <typename T>
constexpr T kNormEps = T(1e-6);

// A row of q or k, divided by its norm if asked; returns the inverse of the norm, 1 without it.
template <typename T>
FW_INLINE T load_normalized(const Problem& p, const Rows& r, int64_t offset, T factor, T* out) {
  const int64_t Kp = padded<T>(p.K);
  if (!p.l2norm) {
    load_row(r, offset, p.K, factor, out);
    return T(1);
  }
  load_row(r, offset, p.K, T(1), out);
  const T inverse = reciprocal_root(dot(out, out, Kp) + kNormEps<T>);
  scale_row(out, Kp, inverse * factor);
  return inverse;
}

// What passes through the norm: with y = x inverse, dy becomes dx = inverse (dy - (dy . y) y).
template <typename T>
FW_INLINE void normalized_backward(int64_t Kp, T inverse, const T* y, T* dy) {
  const Vec<T> along = set1(dot(dy, y, Kp)), factor = set1(inverse);
  for (int64_t j = 0; j < Kp; j += kLanes<T>) store(dy + j, (load(dy + j) - along * load(y + j)) * factor);
}

template <typename T>
FW_INLINE Vec<T> beta_of(const Problem& p, Vec<T> given) {
  return p.beta_range == 0 ? given : set1(T(p.beta_range)) * sigmoid(given);
}

template <typename T>
FW_INLINE T load_beta(const Problem& p, int64_t offset) {
  return p.beta.data ? beta_of<T>(p, set1(static_cast<const T*>(p.beta.data)[offset]))[0] : T(1);
}

// d beta / d (what was given), of beta.
template <typename T>
FW_INLINE T beta_slope(const Problem& p, T beta) {
  return p.beta_range == 0 ? T(1) : beta * (T(1) - beta / T(p.beta_range));
}

// e = -beta (erase * k).
template <typename T>
FW_INLINE void load_erase_key(const Problem& p, int64_t offset, T beta, const T* k, T* e) {
  const int64_t Kp = padded<T>(p.K);
  if (p.erase.data) {
    load_row(p.erase, offset, p.K, -beta, e);
    for (int64_t j = 0; j < Kp; j += kLanes<T>) store(e + j, load(e + j) * load(k + j));
  } else {
    for (int64_t j = 0; j < Kp; j += kLanes<T>) store(e + j, load(k + j) * set1(-beta));
  }
}

// u = beta (write * v) for the columns of the task, zeros up to ld. `room` has ld elements.
template <typename T>
FW_INLINE void load_value(const Problem& p, const Sequence& s, const Task& task, int64_t i, T beta, T* u, T* room,
                          int64_t ld) {
  load_row(p.v, s.offset(p.v, i, task.head) + task.column, task.width, beta, u);
  const int64_t end = padded<T>(task.width);
  if (p.write.data) {
    load_row(p.write, s.offset(p.write, i, task.head) + task.column, task.width, T(1), room);
    for (int64_t j = 0; j < end; j += kLanes<T>) store(u + j, load(u + j) * load(room + j));
  }
  for (int64_t j = end; j < ld; ++j) u[j] = T(0);
}

// What turns the given gates of one head into log-decays, and back for the gradients.
template <typename T>
struct GateOf {
  Decay decay;
  Vec<T> rate, bound;  // exp(A_log)
  const T* bias;       // null: 0
  bool channel;

  FW_INLINE GateOf of(const Problem& p, int64_t head) {
    const bool channel = p.gate == Gate::channel;
    const T* A_log = static_cast<const T*>(p.A_log);
    const T* bias = static_cast<const T*>(p.bias);
    return {p.decay, exp(set1(A_log ? A_log[head] : T(0))), set1(T(p.lower_bound)),
            bias ? bias + head * (channel ? p.K : 1) : nullptr, channel};
  }

  // The bias of the n <= lanes elements from j on.
  Vec<T> bias_at(int64_t j, int64_t n) const {
    return !bias ? zero<T>() : channel ? load_as(bias + j, n) : set1(bias[0]);
  }

  Vec<T> operator()(Vec<T> x, int64_t j, int64_t n) const {
    if (decay == Decay::given) return x;
    const Vec<T> y = x + bias_at(j, n);
    return decay == Decay::softplus ? -rate * softplus(y) : bound * sigmoid(rate * y);
  }

  // Turns dg into the gradient of x and returns what A_log gets.
  Vec<T> backward(Vec<T> x, int64_t j, int64_t n, Vec<T>& dg) const {
    const Vec<T> y = x + bias_at(j, n);
    if (decay == Decay::softplus) {
      const Vec<T> to_A_log = -rate * softplus(y) * dg;
      dg = -rate * sigmoid(y) * dg;
      return dg == zero<T>() ? zero<T>() : to_A_log;
    }
    const Vec<T> s = sigmoid(rate * y);
    dg = bound * rate * s * (T(1) - s) * dg;
    return dg == zero<T>() ? zero<T>() : dg * y;
  }
};

// exp g of token i: [padded(K)] with a gate per channel, one number otherwise.
template <typename T>
FW_INLINE void load_channel_decay(const Problem& p, const GateOf<T>& gate, const T* g, T* out) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  for (; j + L <= p.K; j += L) store(out + j, exp(gate(load(g + j), j, L)));
  if (j < p.K) store(out + j, exp(gate(load_as(g + j, p.K - j), j, p.K - j)));
}

template <typename T>
FW_INLINE void load_decay(const Problem& p, const Sequence& s, int64_t i, int64_t head, T* out) {
  if (p.gate == Gate::none) {
    out[0] = T(1);
    return;
  }
  const GateOf<T> gate = GateOf<T>::of(p, head);
  const T* g = static_cast<const T*>(p.g.data) + s.offset(p.g, i, head);
  if (p.gate == Gate::channel) {
    load_channel_decay(p, gate, g, out);
  } else {
    out[0] = exp(gate(set1(g[0]), 0, 1))[0];
  }
}

}  // namespace fastweights::delta_rule::FW_LEVEL
