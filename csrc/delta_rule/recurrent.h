// The recurrence token by token: every decode step, and sequences too short for chunks.
#pragma once

#include "core/decay.h"
#include "core/scratch.h"
#include "delta_rule/token.h"

namespace fastweights::delta_rule::FW_LEVEL {

// d += S^T e, o += S^T q for R rows of S, in one sweep: d and o are read once for R rows.
template <typename T, int R>
FW_INLINE void read_rows(int64_t columns, const T* S, int64_t ld, const T* e, const T* q, T* d, T* o) {
  constexpr int L = kLanes<T>;
  Vec<T> er[R], qr[R];
  FW_UNROLL
  for (int r = 0; r < R; ++r) er[r] = set1(e[r]), qr[r] = set1(q[r]);
  for (int64_t j = 0; j < columns; j += L) {
    Vec<T> correction = load(d + j), out = load(o + j);
    FW_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<T> s = load(S + r * ld + j);
      correction = fma(er[r], s, correction);
      out = fma(qr[r], s, out);
    }
    store(d + j, correction);
    store(o + j, out);
  }
}

// One token: S <- diag(a) S + k d^T and o = S^T q, where on entry d = u and e and q already have the decay a in them;
// kq = k . q without it. a_step 0: one decay for all rows. columns is a multiple of the lane count.
template <typename T>
FW_INLINE void advance(int64_t K, int64_t columns, T* S, int64_t ld, const T* q, const T* k, const T* e, const T* a,
                       int64_t a_step, T kq, T* d, T* o) {
  constexpr int L = kLanes<T>, R = 4;
  for (int64_t j = 0; j < columns; j += L) store(o + j, zero<T>());
  int64_t i = 0;
  for (; i + R <= K; i += R) read_rows<T, R>(columns, S + i * ld, ld, e + i, q + i, d, o);
  for (; i < K; ++i) read_rows<T, 1>(columns, S + i * ld, ld, e + i, q + i, d, o);
  for (int64_t j = 0; j < columns; j += L) store(o + j, fma(set1(kq), load(d + j), load(o + j)));
  for (i = 0; i < K; ++i) {
    const Vec<T> key = set1(k[i]), decay = set1(a[i * a_step]);
    for (int64_t j = 0; j < columns; j += L) store(S + i * ld + j, fma(key, load(d + j), load(S + i * ld + j) * decay));
  }
}

// The rows of one token, its decay already in q and e.
template <typename T>
struct Token {
  int64_t Kp, ld;
  T *q, *k, *e, *a, *d, *o, *room;
  T kq;

  static size_t bytes(const Problem& p, int64_t columns) {
    return 4 * Scratch::take_bytes<T>(padded<T>(p.K)) + 3 * Scratch::take_bytes<T>(padded<T>(columns));
  }

  Token(const Problem& p, int64_t columns, Scratch& scratch) : Kp(padded<T>(p.K)), ld(padded<T>(columns)) {
    q = scratch.take<T>(Kp), k = scratch.take<T>(Kp), e = scratch.take<T>(Kp), a = scratch.take<T>(Kp);
    d = scratch.take<T>(ld), o = scratch.take<T>(ld), room = scratch.take<T>(ld);
  }

  void load(const Problem& p, const Sequence& s, const Task& task, int64_t i) {
    const T beta = load_beta<T>(p, s.offset(p.beta, i, task.head));
    load_normalized(p, p.q, s.offset(p.q, i, task.key_head), T(p.scale), q);
    load_normalized(p, p.k, s.offset(p.k, i, task.key_head), T(1), k);
    load_erase_key(p, s.offset(p.erase, i, task.head), beta, k, e);
    load_value(p, s, task, i, beta, d, room, ld);
    load_decay(p, s, i, task.head, a);
    kq = dot(k, q, Kp);
    if (p.gate == Gate::channel) {
      scale_elements(1, Kp, a, q, q);
      scale_elements(1, Kp, a, e, e);
    } else if (p.gate != Gate::none) {
      scale_row(q, Kp, a[0]);
      scale_row(e, Kp, a[0]);
    }
  }
};

}  // namespace fastweights::delta_rule::FW_LEVEL
