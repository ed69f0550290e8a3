// One token of hybrid attention: the state is swept once, each row updated and read out while it is in registers.
#include "attention/kernel.h"
#include "core/element.h"
#include "core/scratch.h"
#include "core/vmath.h"

namespace fastweights::attention::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

FW_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <typename T>
FW_INLINE int64_t whole_vectors(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// NV vectors of columns, the last of them partial if `part` is not 0.
template <typename T, int NV>
struct Columns {
  Vec<T> x[NV];

  static __attribute__((always_inline)) Columns read(const T* p, int64_t part) {
    Columns c;
    FW_UNROLL
    for (int i = 0; i < NV; ++i)
      c.x[i] = part && i == NV - 1 ? load_as(p + i * kLanes<T>, part) : load(p + i * kLanes<T>);
    return c;
  }
  static __attribute__((always_inline)) void write(T* p, const Columns& c, int64_t part) {
    FW_UNROLL
    for (int i = 0; i < NV; ++i) {
      if (part && i == NV - 1) {
        store_as(p + i * kLanes<T>, c.x[i], part);
      } else {
        store(p + i * kLanes<T>, c.x[i]);
      }
    }
  }
  static __attribute__((always_inline)) void add(Columns& c, T a, const Columns& b) {
    FW_UNROLL
    for (int i = 0; i < NV; ++i) c.x[i] = fma(set1(a), b.x[i], c.x[i]);
  }
};

// A run of slots of the rings, in the order of the tokens but for the wrap.
struct Slots {
  int64_t first, count, ring;
  static __attribute__((always_inline)) int64_t at(const Slots& s, int64_t i) {
    const int64_t slot = s.first + i;
    return slot < s.ring ? slot : slot - s.ring;
  }
};

template <typename T>
struct Token {
  T *q, *k, *v, *qf, *scores, *linear;  // linear [group, whole vectors of V]
  T* den;                               // [group]
  T* decay;                             // [whole vectors of F]
};

template <typename S>
FW_INLINE const S* row_of(const Rows& r, int64_t b, int64_t head) {
  return static_cast<const S*>(r.data) + b * r.batch + head * r.head;
}

template <typename S>
static void widen_row(Compute<S>* dst, const S* src, int64_t n) {
  constexpr int L = kLanes<Compute<S>>;
  int64_t d = 0;
  for (; d + L <= n; d += L) store(dst + d, load_as(src + d));
  if (d < n) store(dst + d, load_as(src + d, n - d));
}

// Columns [at, at + NV vectors) of the state: decay, take in what leaves the window, read out for each query head.
template <typename T, int NV>
static void sweep_state(const StepArgs& a, T* S, int64_t at, int64_t part, const Slots& leaving, const T* kf,
                        const T* v, const Token<T>& t, int64_t group) {
  using C = Columns<T, NV>;
  const int64_t qf_stride = whole_vectors<T>(a.F), linear_stride = whole_vectors<T>(a.V);
  for (int64_t x = 0; x < group; ++x) {
    C sum{};
    const T* qf = t.qf + x * qf_stride;
    for (int64_t f = 0; f < a.F; ++f) {
      T* row = S + f * a.V + at;
      C c = C::read(row, part);
      if (x == 0) {
        FW_UNROLL
        for (int i = 0; i < NV; ++i) c.x[i] *= set1(t.decay[f]);
        for (int64_t j = 0; j < leaving.count; ++j) {
          const int64_t slot = Slots::at(leaving, j);
          C::add(c, kf[slot * a.F + f], C::read(v + slot * a.V + at, part));
        }
        C::write(row, c, part);
      }
      C::add(sum, qf[f], c);
    }
    C::write(t.linear + x * linear_stride + at, sum, 0);
  }
}

// Columns of the output of one query head: the window's values by their weights, joined with the linear part.
template <typename S, int NV>
static void read_window(const StepArgs& a, S* o, int64_t at, int64_t part, const Slots& window,
                        const Compute<S>* values, const Token<Compute<S>>& t, const Compute<S>* linear,
                        Compute<S> inverse) {
  using T = Compute<S>;
  using C = Columns<T, NV>;
  C sum = C::read(linear + at, 0);
  for (int64_t j = 0; j < window.count; ++j)
    C::add(sum, t.scores[j], C::read(values + Slots::at(window, j) * a.V + at, part));
  C::add(sum, t.scores[window.count], C::read(t.v + at, 0));
  FW_UNROLL
  for (int i = 0; i < NV; ++i) {
    const Vec<T> y = sum.x[i] * set1(inverse);
    if (part && i == NV - 1) {
      store_as(o + at + i * kLanes<T>, y, part);
    } else {
      store_as(o + at + i * kLanes<T>, y);
    }
  }
}

template <typename T>
static T dot(const T* a, const T* b, int64_t n) {
  constexpr int L = kLanes<T>;
  Vec<T> even = {}, odd = {};
  int64_t d = 0;
  for (; d + 2 * L <= n; d += 2 * L) {
    even = fma(load(a + d), load(b + d), even);
    odd = fma(load(a + d + L), load(b + d + L), odd);
  }
  for (; d < n; d += L) even = fma(load_as(a + d, smaller(L, n - d)), load_as(b + d, smaller(L, n - d)), even);
  return reduce_add<T>(even + odd);
}

// f.template operator()<NV>(at, part) over the columns of V, in as wide strips as there are registers for.
template <typename T, typename F>
FW_INLINE void for_columns(int64_t V, F f) {
  constexpr int L = kLanes<T>;
  int64_t at = 0;
  for (; at + 8 * L <= V; at += 8 * L) f.template operator()<8>(at, int64_t(0));
  for (; at + 2 * L <= V; at += 2 * L) f.template operator()<2>(at, int64_t(0));
  for (; at < V; at += L) f.template operator()<1>(at, at + L <= V ? int64_t(0) : V - at);
}

template <typename S>
static void step_head(const StepArgs& a, int64_t b, int64_t hs, const Token<Compute<S>>& t) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t group = a.HQ / a.HS, first = hs * group, hkv = first / (a.HQ / a.HKV), hf = first / (a.HQ / a.HF);
  const int64_t position = a.position[b], qf_stride = whole_vectors<T>(a.F), linear_stride = whole_vectors<T>(a.V);
  const T* k_ring = static_cast<const T*>(a.k_ring) + (b * a.HKV + hkv) * a.ring * a.K;
  const T* v_ring = static_cast<const T*>(a.v_ring) + (b * a.HKV + hkv) * a.ring * a.V;
  const T* kf_ring = static_cast<const T*>(a.kf_ring) + (b * a.HF + hf) * a.ring * a.F;
  T* state = static_cast<T*>(a.S) + (b * a.HS + hs) * a.F * a.V;
  T* z = static_cast<T*>(a.z) + (b * a.HS + hs) * a.F;

  // Which tokens are in the window, and which leave it now.
  Slots window, leaving;
  window.ring = leaving.ring = a.ring;
  if (a.ring == a.window) {
    window.count = smaller(position, a.window - 1);
    leaving.count = position >= a.window ? 1 : 0;
    leaving.first = position % a.ring;
  } else {
    const int64_t own = position % a.window;
    window.count = own + (position >= a.window ? a.window : 0);
    leaving.count = own == 0 && position >= a.ring ? a.window : 0;
    leaving.first = position % a.ring;
  }
  window.first = (position - window.count) % a.ring;

  const T* g = a.g.data ? row_of<T>(a.g, b, first / (a.HQ / a.HG)) : nullptr;
  for (int64_t f = 0; f < a.F; f += L) {
    const int64_t n = smaller(L, a.F - f);
    store(t.decay + f, g ? exp(a.per_channel ? load_as(g + f, n) : set1(g[0])) : set1(T(1)));
  }
  for (int64_t x = 0; x < group; ++x) widen_row(t.qf + x * qf_stride, row_of<S>(a.qf, b, first + x), a.F);
  for (int64_t f = 0; f < a.F; ++f) {
    T sum = t.decay[f] * z[f];
    for (int64_t j = 0; j < leaving.count; ++j) sum += kf_ring[Slots::at(leaving, j) * a.F + f];
    z[f] = sum;
  }
  for (int64_t x = 0; x < group; ++x) t.den[x] = dot(t.qf + x * qf_stride, z, a.F);
  for_columns<T>(a.V, [&]<int NV>(int64_t at, int64_t part) {
    sweep_state<T, NV>(a, state, at, part, leaving, kf_ring, v_ring, t, group);
  });

  widen_row(t.k, row_of<S>(a.k, b, hkv), a.K);
  widen_row(t.v, row_of<S>(a.v, b, hkv), a.V);
  const int64_t seen = window.count + 1;
  for (int64_t x = 0; x < group; ++x) {
    const int64_t hq = first + x;
    widen_row(t.q, row_of<S>(a.q, b, hq), a.K);
    T top = dot(t.q, t.k, a.K) * T(a.scale);
    t.scores[window.count] = top;
    for (int64_t j = 0; j < window.count; ++j) {
      const T score = dot(t.q, k_ring + Slots::at(window, j) * a.K, a.K) * T(a.scale);
      t.scores[j] = score;
      top = score > top ? score : top;
    }
    const T* sink = a.sink.data ? row_of<T>(a.sink, b, hq) : nullptr;
    top = sink && *sink > top ? *sink : top;
    const T mix = static_cast<const T*>(a.mix)[hq];
    T den = sink ? t.den[x] + mix * exp(set1(*sink - top))[0] : t.den[x];
    for (int64_t j = 0; j < seen; j += L) {
      const Vec<T> w = set1(mix) * exp(load(t.scores + j) - set1(top));
      store(t.scores + j, w);
      for (int64_t i = 0; i < smaller(L, seen - j); ++i) den += t.scores[j + i];
    }
    S* o = static_cast<S*>(a.o) + (b * a.HQ + hq) * a.V;
    for_columns<T>(a.V, [&]<int NV>(int64_t at, int64_t part) {
      read_window<S, NV>(a, o, at, part, window, v_ring, t, t.linear + x * linear_stride, T(1) / den);
    });
  }
}

template <typename S>
static void step_tasks(const StepArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t group = a.HQ / a.HS;
  const int64_t sizes[] = {
      a.K + L, a.K + L, a.V + L, group * whole_vectors<T>(a.F), a.ring + 2 * L, group * whole_vectors<T>(a.V),
      group,   a.F + L};
  size_t bytes = 0;
  for (int64_t size : sizes) bytes += Scratch::take_bytes<T>(size);
  Scratch memory(bytes);
  Token<T> t;
  T** parts[] = {&t.q, &t.k, &t.v, &t.qf, &t.scores, &t.linear, &t.den, &t.decay};
  for (int i = 0; i < 8; ++i) *parts[i] = memory.take<T>(sizes[i]);
  // exp reads whole vectors of scores
  for (int64_t i = 0; i < a.ring + 2 * L; ++i) t.scores[i] = T(0);
  for (int64_t task = begin; task < end; ++task) step_head<S>(a, task / a.HS, task % a.HS, t);
}

template <typename S>
static void remember_tasks(const StepArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t slot = a.position[b] % a.ring;
    const struct {
      const Rows& from;
      void* ring;
      int64_t heads, D;
    } places[] = {{a.k, a.k_ring, a.HKV, a.K}, {a.v, a.v_ring, a.HKV, a.V}, {a.kf, a.kf_ring, a.HF, a.F}};
    for (const auto& p : places) {
      for (int64_t h = 0; h < p.heads; ++h) {
        T* row = static_cast<T*>(p.ring) + ((b * p.heads + h) * a.ring + slot) * p.D;
        const S* from = row_of<S>(p.from, b, h);
        for (int64_t d = 0; d < p.D; d += kLanes<T>) {
          const int64_t n = smaller(kLanes<T>, p.D - d);
          store_as(row + d, load_as(from + d, n), n);
        }
      }
    }
    a.position[b] += 1;
  }
}

void step(const StepArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.element, [&]<typename S>(S) { step_tasks<S>(a, begin, end); });
}

void remember(const StepArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.element, [&]<typename S>(S) { remember_tasks<S>(a, begin, end); });
}

}  // namespace fastweights::attention::FW_LEVEL
