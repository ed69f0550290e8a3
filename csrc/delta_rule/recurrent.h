// The recurrence token by token: every decode step, and sequences too short for chunks.
#pragma once

#include "core/decay.h"
#include "core/scratch.h"
#include "delta_rule/token.h"

namespace fastweights::delta_rule::FW_LEVEL {

// One token: S <- diag(a) S + k d^T and o = S^T q, where on entry d = u and e and q already have the decay a in them;
// kq = k . q without it. a_step 0: one decay for all rows. NV vectors of columns, whose d and o stay in registers.
template <typename T, int NV>
FW_INLINE void advance_strip(int64_t K, T* S, int64_t ld, const T* q, const T* k, const T* e, const T* a,
                             int64_t a_step, T kq, T* d, T* o) {
  constexpr int L = kLanes<T>;
  Vec<T> correction[NV], out[NV];
  FW_UNROLL
  for (int j = 0; j < NV; ++j) correction[j] = load(d + j * L), out[j] = zero<T>();
  for (int64_t i = 0; i < K; ++i) {
    const Vec<T> erase = set1(e[i]), query = set1(q[i]);
    FW_UNROLL
    for (int j = 0; j < NV; ++j) {
      const Vec<T> s = load(S + i * ld + j * L);
      correction[j] = fma(erase, s, correction[j]);
      out[j] = fma(query, s, out[j]);
    }
  }
  FW_UNROLL
  for (int j = 0; j < NV; ++j) {
    store(d + j * L, correction[j]);
    store(o + j * L, fma(set1(kq), correction[j], out[j]));
  }
  for (int64_t i = 0; i < K; ++i) {
    const Vec<T> key = set1(k[i]), decay = set1(a[i * a_step]);
    FW_UNROLL
    for (int j = 0; j < NV; ++j) {
      T* s = S + i * ld + j * L;
      store(s, fma(key, correction[j], load(s) * decay));
    }
  }
}

// The strips are as wide as registers allow: narrow ones waste the memory's bursts. columns is a multiple of the lane
// count.
template <typename T, int NV = 2 * kTileVectors>
FW_INLINE void advance(int64_t K, int64_t columns, T* S, int64_t ld, const T* q, const T* k, const T* e, const T* a,
                       int64_t a_step, T kq, T* d, T* o) {
  constexpr int64_t width = NV * kLanes<T>;
  int64_t j = 0;
  for (; j + width <= columns; j += width) advance_strip<T, NV>(K, S + j, ld, q, k, e, a, a_step, kq, d + j, o + j);
  if constexpr (NV > 1) {
    if (j < columns) advance<T, NV / 2>(K, columns - j, S + j, ld, q, k, e, a, a_step, kq, d + j, o + j);
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
