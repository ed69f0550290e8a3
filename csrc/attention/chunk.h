// A sequence of one head is worked on in chunks of queries. Everything of a chunk that concerns pairs is kept as
// [keys, queries]: then the softmax runs down the columns, a vector of queries at a time, keys and values are used as
// they lie in memory, and only the queries are transposed.
#pragma once

#include "attention/kernel.h"
#include "core/gemm.h"
#include "core/scratch.h"
#include "core/vmath.h"

namespace fastweights::attention::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

template <typename T>
FW_INLINE constexpr int64_t round_up(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

FW_INLINE int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
FW_INLINE int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// Queries of a chunk: few, so that little is spent on pairs that the masks hide; more when the window is so wide that
// packing its keys counts.
template <typename T>
FW_INLINE int64_t chunk_size(const Inputs& a) {
  return (a.window > 128 ? 8 : 4) * kLanes<T>;
}

// One query head of one sequence. Tokens are counted from the first of this call; the past has negative numbers.
struct Head {
  int64_t n, hq, hkv, hf, hg, hs;
  int64_t batch, first, length;  // where its tokens lie
  int64_t start, past;           // tokens before this call, and how many of them the rings hold
};

static Head head_of(const Inputs& a, int64_t n, int64_t hq) {
  Head h;
  h.n = n;
  h.hq = hq;
  h.hkv = hq / (a.HQ / a.HKV);
  h.hf = a.F ? hq / (a.HQ / a.HF) : 0;
  h.hg = a.F ? hq / (a.HQ / a.HG) : 0;
  h.hs = a.F ? hq / (a.HQ / a.HS) : 0;
  h.batch = a.packed ? 0 : n;
  h.first = a.packed ? a.bounds[n] : 0;
  h.length = a.packed ? a.bounds[n + 1] - a.bounds[n] : a.length;
  h.start = a.position ? a.position[n] : 0;
  h.past = min64(h.start, a.position ? a.ring : 0);
  return h;
}

// Queries [i0, i0 + n) and the keys [j0, j0 + nk) that they need, of which the first nz leave the window during the
// chunk: the zone, where a query sees a key through its softmax or its features, depending on who came first.
struct Span {
  int64_t i0, n, j0, nk, nz;
};

static Span span_at(const Inputs& a, const Head& h, int64_t i0, int64_t chunk, int64_t end) {
  Span s;
  s.i0 = i0;
  s.n = min64(chunk, end - i0);
  int64_t lo, hi, zone_begin, zone_end;
  if (a.layout == Layout::terraced) {
    const int64_t block = (h.start + i0) / a.window * a.window - h.start;
    s.n = min64(s.n, block + a.window - i0);
    lo = block - a.window;
    hi = i0 + s.n;
    zone_begin = block == i0 ? lo - a.window : lo;
    zone_end = lo;
  } else {
    lo = i0 - a.window + 1;
    hi = a.layout == Layout::symmetric ? min64(i0 + s.n - 1 + a.window, h.length) : i0 + s.n;
    zone_begin = i0 - a.window;
    zone_end = zone_begin + s.n;
  }
  if (a.F == 0) zone_begin = zone_end = lo;
  s.j0 = max64(zone_begin, -h.past);
  s.nz = max64(zone_end - s.j0, 0);
  s.nk = hi - s.j0;
  return s;
}

static int64_t most_keys(const Inputs& a, const Head& h, int64_t chunk) {
  const int64_t reach = a.layout == Layout::sliding ? a.window + chunk : 3 * a.window + chunk;
  return min64(reach, h.past + h.length);
}

static int64_t most_zone(const Inputs& a, const Head& h, int64_t chunk) {
  return a.F == 0 ? 0 : min64(a.layout == Layout::terraced ? a.window : chunk, h.past + h.length);
}

// The query of the chunk, counted from i0, at which zone key j (counted from j0) leaves the window.
FW_INLINE int64_t leaves_at(const Inputs& a, const Span& s, int64_t j) {
  return a.layout == Layout::terraced ? 0 : s.j0 + j + a.window - s.i0;
}

// ---- packing -------------------------------------------------------------------------------------------------------

// dst [n, ld] = compute type, zero beyond D.
template <typename S>
static void pack_tokens(Compute<S>* dst, int64_t ld, int64_t D, const Rows& src, const Head& h, int64_t head,
                        int64_t begin, int64_t n) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const S* row =
      static_cast<const S*>(src.data) + h.batch * src.batch + (h.first + begin) * src.token + head * src.head;
  const int64_t whole = D / L * L;
  for (int64_t i = 0; i < n; ++i, row += src.token, dst += ld) {
    for (int64_t d = 0; d < whole; d += L) store(dst + d, load_as(row + d));
    if (whole < ld) store(dst + whole, load_as(row + whole, D - whole));
    for (int64_t d = whole + L; d < ld; d += L) store(dst + d, zero<T>());
  }
}

// The same for keys, whose first rows may lie in the ring: [sequences, heads, ring, D].
template <typename S>
static void pack_keys(Compute<S>* dst, int64_t ld, int64_t D, const Rows& src, const void* ring, const Inputs& a,
                      const Head& h, int64_t head, int64_t heads, int64_t begin, int64_t n) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t old = max64(min64(-begin, n), 0);
  for (int64_t j = 0; j < old; ++j, dst += ld) {
    const int64_t slot = (h.start + begin + j) % a.ring;
    const T* row = static_cast<const T*>(ring) + ((h.n * heads + head) * a.ring + slot) * D;
    for (int64_t d = 0; d < ld; d += L) store(dst + d, load_as(row + d, max64(min64(D - d, L), 0)));
  }
  pack_tokens<S>(dst, ld, D, src, h, head, begin + old, n - old);
}

// dst [D, ld] = factor * src [n, ld_src] transposed; columns from n to the next whole vector become zero.
template <typename T>
static void transpose(T* dst, int64_t ld, const T* src, int64_t ld_src, int64_t n, int64_t D, T factor) {
  constexpr int L = kLanes<T>;
  const Vec<T> f = set1(factor);
  for (int64_t i = 0; i < n; i += L) {
    const int64_t rows = min64(L, n - i);
    for (int64_t d = 0; d < D; ++d) {
      Vec<T> column = {};
      for (int r = 0; r < L; ++r) column[r] = r < rows ? src[(i + r) * ld_src + d] : T(0);
      store(dst + d * ld + i, column * f);
    }
  }
}

// ---- decay
// -----------------------------------------------------------------------------------------------------------

// The factors between points of a chunk, each the exponential of one segment of g.
template <typename T>
struct Decay {
  bool any;
  T* pair;        // [chunk, chunk]: (l, i) from query l to query i >= l, else 0
  T* from_start;  // [chunk]: from before the chunk to query i, itself included; 0 beyond n
  T* to_end;      // [chunk]: from query l to the end
  T whole;        // over the chunk
};

// Running sums in double, and −inf (or what no exponential survives) counted instead of summed: differences of sums
// then neither lose digits nor become inf − inf.
template <typename T>
static void decay_of_chunk(Decay<T>& d, const Inputs& a, const Head& h, const Span& s, int64_t chunk) {
  constexpr int L = kLanes<T>;
  constexpr double forgotten = sizeof(T) == 8 ? -800 : -150;
  d.any = a.g.data && !a.per_channel;
  d.whole = T(1);
  for (int64_t i = 0; i < chunk; ++i) d.from_start[i] = i < s.n ? T(1) : T(0);
  if (!d.any) return;
  double sum[8 * kLanes<T>];
  int64_t resets[8 * kLanes<T>];
  const T* g = static_cast<const T*>(a.g.data) + h.batch * a.g.batch + (h.first + s.i0) * a.g.token + h.hg * a.g.head;
  double total = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < s.n; ++i) {
    const double x = double(g[i * a.g.token]);
    if (x < forgotten) {
      ++count;
    } else {
      total += x;
    }
    sum[i] = total;
    resets[i] = count;
    d.from_start[i] = count ? T(0) : exp(T(total));
  }
  d.whole = d.from_start[s.n - 1];
  for (int64_t l = 0; l < s.n; ++l) {
    T* row = d.pair + l * chunk;
    for (int64_t i = 0; i < round_up<T>(s.n); ++i) {
      const bool kept = l <= i && i < s.n && resets[i] == resets[l];
      row[i] = kept ? T(sum[i] - sum[l]) : T(-1e4);
    }
    for (int64_t i = 0; i < s.n; i += L) store(row + i, exp(load(row + i)));
    d.to_end[l] = row[s.n - 1];
  }
}

// ---- the weights of a chunk
// -------------------------------------------------------------------------------------------

// Per query: the window [lo, hi) counted from j0, as floating point for comparison with vectors of key numbers.
template <typename T>
struct Windows {
  T *lo, *hi;
};

template <typename T>
static void windows_of_chunk(Windows<T>& w, const Inputs& a, const Head& h, const Span& s) {
  const int64_t block = a.layout == Layout::terraced ? (h.start + s.i0) / a.window * a.window - h.start : 0;
  for (int64_t r = 0; r < round_up<T>(s.n); ++r) {
    const int64_t i = s.i0 + r;
    const int64_t lo = max64(a.layout == Layout::terraced ? block - a.window : i - a.window + 1, s.j0);
    const int64_t hi = a.layout == Layout::symmetric ? min64(i + a.window, h.length) : i + 1;
    w.lo[r] = r < s.n ? T(lo - s.j0) : T(0);
    w.hi[r] = r < s.n ? T(hi - s.j0) : T(0);
  }
}

template <typename T>
FW_INLINE Vec<T> lane_numbers() {
  Vec<T> v = {};
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T(i);
  return v;
}

// The scores of the sinks of the chunk's queries, or null. A sink is one more key of every window, of value zero.
template <typename T>
static const T* sinks_of_chunk(T* dst, const Inputs& a, const Head& h, const Span& s) {
  if (!a.sink.data) return nullptr;
  const T* from = static_cast<const T*>(a.sink.data) + h.batch * a.sink.batch + (h.first + s.i0) * a.sink.token +
                  h.hq * a.sink.head;
  for (int64_t r = 0; r < round_up<T>(s.n); ++r) dst[r] = r < s.n ? from[r * a.sink.token] : T(0);
  return dst;
}

// From scores s [nk, ld] and similarities a [nz, ld] of features: the weights w [nk, ld], zero where a query does not
// see a key; the window's maximum m and the sum of the weights, the sink's included, per query. w may be s.
template <typename T>
static void weigh(T* w, T* m, T* sum, const T* scores, const T* similarity, const T* sink, int64_t ld, T mix,
                  const Inputs& a, const Span& s, const Windows<T>& win, const Decay<T>& decay) {
  constexpr int L = kLanes<T>;
  const Vec<T> lowest = set1(T(-__builtin_inf()));
  for (int64_t c = 0; c < s.n; c += L) {
    const Vec<T> lo = load(win.lo + c), hi = load(win.hi + c), number = lane_numbers<T>() + set1(T(c));
    const int64_t first = int64_t(win.lo[c]), last = int64_t(win.hi[min64(c + L, s.n) - 1]);
    Vec<T> top = sink ? load(sink + c) : lowest;
    for (int64_t j = first; j < last; ++j) {
      const Vec<T> jj = set1(T(j));
      const auto visible = (jj >= lo) & (jj < hi);
      const Vec<T> x = load(scores + j * ld + c);
      top = max(top, visible ? x : lowest);
    }
    top = top == lowest ? zero<T>() : top;
    Vec<T> total = sink ? set1(mix) * exp(load(sink + c) - top) : zero<T>();
    for (int64_t j = 0; j < s.nk; ++j) {
      Vec<T> weight = {};
      if (first <= j && j < last) {
        const Vec<T> jj = set1(T(j));
        const auto visible = (jj >= lo) & (jj < hi);
        const Vec<T> p = set1(mix) * exp(load(scores + j * ld + c) - top);
        weight = visible ? p : weight;
      }
      if (j < s.nz) {
        const int64_t l = leaves_at(a, s, j);
        Vec<T> linear = load(similarity + j * ld + c);
        if (decay.any) linear = linear * load(decay.pair + l * ld + c);
        weight = number >= set1(T(l)) ? linear : weight;
      }
      total += weight;
      store(w + j * ld + c, weight);
    }
    store(m + c, top);
    store(sum + c, total);
  }
}

// ---- the state
// ---------------------------------------------------------------------------------------------------------

// S [F, ldv] and z [F] of a head, from the past or zero.
template <typename T>
static void load_state(T* S, T* z, int64_t ldv, const Inputs& a, const Head& h) {
  constexpr int L = kLanes<T>;
  const int64_t at = h.n * a.HS + h.hs;
  for (int64_t f = 0; f < a.F; ++f) {
    const T* row = a.S0 ? static_cast<const T*>(a.S0) + (at * a.F + f) * a.V : nullptr;
    for (int64_t v = 0; v < ldv; v += L)
      store(S + f * ldv + v, row ? load_as(row + v, max64(min64(a.V - v, L), 0)) : zero<T>());
    z[f] = a.z0 ? static_cast<const T*>(a.z0)[at * a.F + f] : T(0);
  }
}

// The zone kf [nz, ldf], decayed to the end of the chunk, joins the state.
template <typename T>
static void enter_state(T* S, T* z, int64_t ldv, const T* kf, int64_t ldf, const T* v, const Inputs& a, const Span& s) {
  if (s.nz == 0) return;
  gemm<T>(a.F, ldv, s.nz, kf, 1, ldf, v, ldv, S, ldv, true);
  for (int64_t j = 0; j < s.nz; ++j) {
    for (int64_t f = 0; f < a.F; ++f) z[f] += kf[j * ldf + f];
  }
}

// S, z after the chunk: what was there decays, and the zone enters. kf [nz, ldf] is scaled in place by the decay from
// each key's entry to the end of the chunk.
template <typename T>
static void advance_state(T* S, T* z, int64_t ldv, T* kf, int64_t ldf, const T* v, const Inputs& a, const Span& s,
                          const Decay<T>& decay) {
  constexpr int L = kLanes<T>;
  if (decay.any) {
    for (int64_t j = 0; j < s.nz; ++j) {
      const Vec<T> t = set1(decay.to_end[leaves_at(a, s, j)]);
      for (int64_t f = 0; f < ldf; f += L) store(kf + j * ldf + f, load(kf + j * ldf + f) * t);
    }
    const Vec<T> whole = set1(decay.whole);
    for (int64_t x = 0; x < a.F * ldv; x += L) store(S + x, load(S + x) * whole);
    for (int64_t f = 0; f < a.F; ++f) z[f] *= decay.whole;
  }
  enter_state(S, z, ldv, kf, ldf, v, a, s);
}

}  // namespace fastweights::attention::FW_LEVEL
