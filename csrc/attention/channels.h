// A decay per feature channel, the same at every token: between the entry l of a key and a query i >= l every channel
// has lost the factor exp((i - l) g_f). A product over features has no common factor to take out then, so queries are
// taken in blocks of a vector. Towards keys that entered before a block its first query r is a point between the two,
// exp((i - r) g_f) exp((r - l) g_f), and the product is a matrix product of scaled rows; inside the block the factor
// itself is used. All are powers of at most 1: nothing overflows, and -inf is a decay like any other.
#pragma once

#include "attention/chunk.h"

namespace fastweights::attention::FW_LEVEL {

template <typename T>
struct Channels {
  bool any;
  int64_t ldf, ld;
  T* rows;     // [C + 1, ldf]: (d, f) is exp(d g_f)
  T* columns;  // [F, ld]: (f, L + d) is exp(d g_f), zero for d < 0
  T *scaled, *part;
};

// `take(n)` hands out n elements.
template <typename T, typename F>
static void lay_out_channels(Channels<T>& p, const Inputs& a, int64_t C, int64_t zone, int64_t ldf, F take) {
  constexpr int64_t L = kLanes<T>;
  p.any = a.per_channel;
  p.ldf = ldf;
  p.ld = C + 2 * L;
  if (!p.any) return;
  p.rows = take((C + 1) * ldf);
  p.columns = take(a.F * p.ld);
  p.scaled = take(max64(zone, L) * ldf);
  p.part = take(max64(a.F * L, zone * ldf));
}

template <typename T>
static void powers_of_head(const Channels<T>& p, const Inputs& a, const Head& h, int64_t C) {
  constexpr int L = kLanes<T>;
  if (!p.any) return;
  const T* g = static_cast<const T*>(a.g.data) + h.hg * a.g.head;
  for (int64_t x = 0; x < (C + 1) * p.ldf; x += L) store(p.rows + x, zero<T>());
  for (int64_t f = 0; f < a.F; ++f) {
    T* power = p.columns + f * p.ld + L;
    store(power - L, zero<T>());
    for (int64_t d = 0; d <= C; d += L) store(power + d, exp((lane_numbers<T>() + set1(T(d))) * set1(g[f])));
    power[0] = T(1);  // also where g is -inf
    for (int64_t d = 0; d <= C; ++d) p.rows[d * p.ldf + f] = power[d];
  }
}

// How many keys of the zone have entered by query r of the chunk.
FW_INLINE int64_t entered(const Inputs& a, const Span& s, int64_t r) {
  if (a.layout == Layout::terraced) return s.nz;
  return max64(min64(r - leaves_at(a, s, 0) + 1, s.nz), 0);
}

// dst [n, ldf] = the first n keys of the zone, decayed up to query r.
template <typename T>
static void decay_keys(T* dst, const T* kf, const Channels<T>& p, const Inputs& a, const Span& s, int64_t n,
                       int64_t r) {
  for (int64_t j = 0; j < n; ++j) {
    const T* power = p.rows + (r - leaves_at(a, s, j)) * p.ldf;
    for (int64_t f = 0; f < p.ldf; f += kLanes<T>)
      store(dst + j * p.ldf + f, load(kf + j * p.ldf + f) * load(power + f));
  }
}

// The factors exp((i - l) g_f) for the queries i = r ... r + L - 1: zero where i < l.
template <typename T>
FW_INLINE Vec<T> powers_from(const Channels<T>& p, int64_t f, int64_t r, int64_t l) {
  return load(p.columns + f * p.ld + kLanes<T> + r - l);
}

// dst [F, ld] = queries [F, ld], decayed from before the chunk.
template <typename T>
static void decay_queries(T* dst, const T* qft, int64_t ld, const Channels<T>& p, const Inputs& a, const Span& s) {
  for (int64_t f = 0; f < a.F; ++f) {
    for (int64_t c = 0; c < s.n; c += kLanes<T>)
      store(dst + f * ld + c, load(qft + f * ld + c) * powers_from(p, f, c, -1));
  }
}

// similarity [nz, ld]: sum_f kf_jf qf_if exp((i - l) g_f) where i >= l; undefined elsewhere.
template <typename T>
static void similarities(T* similarity, int64_t ld, const T* kf, const T* qft, const Channels<T>& p, const Inputs& a,
                         const Span& s) {
  constexpr int L = kLanes<T>, kKeys = 4;
  for (int64_t r = 0; s.nz > 0 && r < s.n; r += L) {
    const int64_t before = entered(a, s, r), last = entered(a, s, r + L - 1) - 1;
    decay_keys(p.scaled, kf, p, a, s, before, r);
    for (int64_t f = 0; f < a.F; ++f) store(p.part + f * L, load(qft + f * ld + r) * powers_from(p, f, 0, 0));
    gemm<T>(before, L, a.F, p.scaled, p.ldf, 1, p.part, L, similarity + r, ld, false);
    for (int64_t j = before; j <= last; j += kKeys) {
      Vec<T> sum[kKeys] = {};
      const T* key[kKeys];
      int64_t l[kKeys];
      for (int x = 0; x < kKeys; ++x) {
        key[x] = kf + min64(j + x, last) * p.ldf;
        l[x] = leaves_at(a, s, min64(j + x, last));
      }
      for (int64_t f = 0; f < a.F; ++f) {
        const Vec<T> query = load(qft + f * ld + r);
        FW_UNROLL
        for (int x = 0; x < kKeys; ++x) sum[x] = fma(set1(key[x][f]) * powers_from(p, f, r, l[x]), query, sum[x]);
      }
      for (int x = 0; x < kKeys; ++x) store(similarity + min64(j + x, last) * ld + r, sum[x]);
    }
  }
}

// dqft [F, ld] += the gradient of the queries by that of the similarities, da [nz, ld].
template <typename T>
static void add_query_gradients(T* dqft, int64_t ld, const T* da, const T* kf, const Channels<T>& p, const Inputs& a,
                                const Span& s) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; s.nz > 0 && r < s.n; r += L) {
    const int64_t before = entered(a, s, r), end = entered(a, s, r + L - 1);
    decay_keys(p.scaled, kf, p, a, s, before, r);
    gemm<T>(a.F, L, before, p.scaled, 1, p.ldf, da + r, ld, p.part, L, false);
    for (int64_t f = 0; f < a.F; ++f) {
      Vec<T> sum = fma(load(p.part + f * L), powers_from(p, f, 0, 0), load(dqft + f * ld + r));
      for (int64_t j = before; j < end; ++j)
        sum = fma(set1(kf[j * p.ldf + f]) * powers_from(p, f, r, leaves_at(a, s, j)), load(da + j * ld + r), sum);
      store(dqft + f * ld + r, sum);
    }
  }
}

// dkf [nz, ldf] += the gradient of the keys by that of the similarities; qf [n, ldf].
template <typename T>
static void add_key_gradients(T* dkf, const T* da, int64_t ld, const T* qf, const Channels<T>& p, const Inputs& a,
                              const Span& s) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; s.nz > 0 && r < s.n; r += L) {
    const int64_t before = entered(a, s, r), end = entered(a, s, r + L - 1), n = min64(L, s.n - r);
    for (int64_t x = 0; x < n * p.ldf; x += L) store(p.scaled + x, load(qf + r * p.ldf + x) * load(p.rows + x));
    gemm<T>(before, p.ldf, n, da + r, ld, 1, p.scaled, p.ldf, p.part, p.ldf, false);
    for (int64_t j = 0; j < before; ++j) {
      const T* power = p.rows + (r - leaves_at(a, s, j)) * p.ldf;
      for (int64_t f = 0; f < p.ldf; f += L)
        store(dkf + j * p.ldf + f, fma(load(p.part + j * p.ldf + f), load(power + f), load(dkf + j * p.ldf + f)));
    }
    for (int64_t j = before; j < end; ++j) {
      const int64_t l = leaves_at(a, s, j);
      for (int64_t f = 0; f < p.ldf; f += L) {
        Vec<T> sum = load(dkf + j * p.ldf + f);
        for (int64_t i = l; i < r + n; ++i)
          sum = fma(set1(da[j * ld + i]) * load(p.rows + (i - l) * p.ldf + f), load(qf + i * p.ldf + f), sum);
        store(dkf + j * p.ldf + f, sum);
      }
    }
  }
}

// `advance_state` with this decay.
template <typename T>
static void advance_state(T* S, T* z, int64_t ldv, T* kf, const T* v, const Channels<T>& p, const Inputs& a,
                          const Span& s) {
  constexpr int L = kLanes<T>;
  decay_keys(kf, kf, p, a, s, s.nz, s.n - 1);
  const T* whole = p.rows + s.n * p.ldf;
  for (int64_t f = 0; f < a.F; ++f) {
    for (int64_t x = 0; x < ldv; x += L) store(S + f * ldv + x, load(S + f * ldv + x) * set1(whole[f]));
    z[f] *= whole[f];
  }
  enter_state(S, z, ldv, kf, p.ldf, v, a, s);
}

}  // namespace fastweights::attention::FW_LEVEL
