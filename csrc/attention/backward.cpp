// With w_ij the weight of key j for query i (mix · p_ij in the window, d_ij a_ij before it), D_i = Σ_j w_ij and
// u_i = dO_i / D_i, the gradient of a weight is h_ij = u_i · v_j − c_i, c_i = Σ_j w_ij (u_i · v_j) / D_i. Everything
// follows: dv_j = Σ w_ij u_i, ds_ij = mix p_ij h_ij less its sum over the window at the maximum, d(a_ij) = d_ij h_ij.
// The chunks run backwards with the gradient of the state; the states at their starts are computed first.
#include "attention/channels.h"
#include "core/element.h"

namespace fastweights::attention::FW_LEVEL {

template <typename T>
struct Pair {
  T *scores, *weights, *x, *da;  // [nk, C], [nk, C], [nk, C], [nz, C]
};

template <typename T>
FW_INLINE Vec<T> column_dot(const T* a, const T* b, int64_t ld, int64_t n, int64_t c) {
  Vec<T> sum = {};
  for (int64_t r = 0; r < n; ++r) sum = fma(load(a + r * ld + c), load(b + r * ld + c), sum);
  return sum;
}

template <typename T>
FW_INLINE T row_dot(const T* a, const T* b, int64_t n) {
  constexpr int L = kLanes<T>;
  Vec<T> sum = {};
  for (int64_t x = 0; x < n; x += L) sum = fma(load(a + x), load(b + x), sum);
  return reduce_add<T>(sum);
}

template <typename S>
static void store_rows(S* dst, int64_t stride, const Compute<S>* src, int64_t ld, int64_t n, int64_t D,
                       Compute<S> factor) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const Vec<T> f = set1(factor);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t d = 0; d < D; d += L) {
      const Vec<T> x = load(src + r * ld + d) * f;
      if (d + L <= D) {
        store_as(dst + r * stride + d, x);
      } else {
        store_as(dst + r * stride + d, x, D - d);
      }
    }
  }
}

// p.x holds u_i · v_j and becomes the gradient of the scores; p.da becomes that of the similarities. Returns the
// gradient of mix; with a sink, dsink receives its. With features the sum over a window is taken off at its maximum, in
// equal parts where several keys share it; without, the maximum cancels.
template <typename T>
static T score_gradients(const Pair<T>& p, T* dsink, const T* sink, const T* m, const T* c_of, int64_t ld, T mix,
                         const Inputs& a, const Span& s, const Windows<T>& win, const Decay<T>& decay) {
  constexpr int L = kLanes<T>;
  T dmix = 0;
  for (int64_t c = 0; c < s.n; c += L) {
    const Vec<T> lo = load(win.lo + c), hi = load(win.hi + c), number = lane_numbers<T>() + set1(T(c));
    const int64_t first = int64_t(win.lo[c]), last = int64_t(win.hi[min64(c + L, s.n) - 1]);
    const Vec<T> top = load(m + c), shift = load(c_of + c);
    Vec<T> sum = {}, ties = {};
    if (sink) {
      const Vec<T> score = load(sink + c);
      sum = exp(score - top) * -shift;  // h of a key whose value is zero
      ties = score == top ? set1(T(1)) : ties;
      store(dsink + c, set1(mix) * sum);
    }
    for (int64_t j = 0; j < s.nk; ++j) {
      const Vec<T> hv = load(p.x + j * ld + c) - shift;
      if (j < s.nz) {
        const int64_t l = leaves_at(a, s, j);
        const Vec<T> d = decay.any ? hv * load(decay.pair + l * ld + c) : hv;
        store(p.da + j * ld + c, number >= set1(T(l)) ? d : zero<T>());
      }
      Vec<T> ds = {};
      if (first <= j && j < last) {
        const Vec<T> jj = set1(T(j)), score = load(p.scores + j * ld + c);
        const auto visible = (jj >= lo) & (jj < hi);
        const Vec<T> ph = visible ? exp(score - top) * hv : ds;
        sum += ph;
        ties += (visible & (score == top)) ? set1(T(1)) : zero<T>();
        ds = set1(mix) * ph;
      }
      store(p.x + j * ld + c, ds);
    }
    dmix += reduce_add<T>(sum);
    if (a.F == 0) continue;
    const Vec<T> share = set1(mix) * sum / ties;
    if (sink) store(dsink + c, load(sink + c) == top ? load(dsink + c) - share : load(dsink + c));
    for (int64_t j = first; j < last; ++j) {
      const Vec<T> jj = set1(T(j)), ds = load(p.x + j * ld + c);
      const auto at_top = (jj >= lo) & (jj < hi) & (load(p.scores + j * ld + c) == top);
      store(p.x + j * ld + c, at_top ? ds - share : ds);
    }
  }
  return dmix;
}

// Unnamed, so that its members are no weak symbols.
namespace {

template <typename S>
struct Sweep {
  using T = Compute<S>;
  static constexpr int L = kLanes<T>;

  const BackwardArgs& args;
  const Inputs& a;
  const Head h;
  const int64_t C, keys, zone, KP, VP, FP;
  T mix;
  // scratch
  T *q, *qf, *qt, *qft, *qet, *k, *v, *kf, *u, *ut, *su, *vt, *dkft, *m, *sum, *c_of, *dG, *sinks, *dsinks, *dchannels;
  Pair<T> pair;
  Decay<T> decay;
  Channels<T> channels;
  Windows<T> windows;
  T *dS, *dz;

  template <typename F>
  void lay_out(F take) {
    const int64_t zone_columns = round_up<T>(zone);
    q = take(max64(C * KP, C * FP));
    qf = take(C * FP);
    qt = take(a.K * C);
    qft = take(a.F * C);
    qet = a.per_channel ? take(a.F * C) : qft;  // the queries as the state meets them, but for decay.from_start
    k = take(keys * KP);
    v = take(keys * VP);
    kf = take(zone * FP);
    u = take(C * VP);
    ut = take(a.V * C);
    su = take(a.F * C);
    vt = take(a.V * zone_columns);
    dkft = take(a.F * zone_columns);
    m = take(C);
    sum = take(C);
    c_of = take(C);
    dG = take(C);
    sinks = take(C);
    dsinks = take(C);
    dchannels = take(FP);
    lay_out_channels(channels, a, C, zone, FP, take);
    pair.scores = take(keys * C);
    pair.weights = take(keys * C);
    pair.x = take(keys * C);
    pair.da = take(zone * C);
    decay.pair = take(C * C);
    decay.from_start = take(C);
    decay.to_end = take(C);
    windows.lo = take(C);
    windows.hi = take(C);
    dS = take(a.F * VP);
    dz = take(FP);
  }

  Sweep(const BackwardArgs& args_, int64_t n, int64_t hq)
      : args(args_),
        a(args_.in),
        h(head_of(a, n, hq)),
        C(chunk_size<T>(a)),
        keys(most_keys(a, h, C)),
        zone(most_zone(a, h, C)),
        KP(args_.K_pad),
        VP(args_.V_pad),
        FP(args_.F_pad),
        mix(a.mix ? static_cast<const T*>(a.mix)[hq] : T(1)) {}

  // Row of a key's gradient, in the layout of the partial sums.
  int64_t row_of(int64_t j) const {
    const int64_t sequence = a.packed ? h.first : h.n * a.length;
    const int64_t past = a.position ? (h.n + 1) * a.ring : 0;
    return h.hq * args.rows + sequence + past + j;
  }

  int64_t query_row(const Span& s) const { return (h.batch * a.length + h.first + s.i0) * a.HQ + h.hq; }

  void pack_keys_of(const Span& s) {
    pack_keys<S>(v, VP, a.V, a.v, a.v_ring, a, h, h.hkv, a.HKV, s.j0, s.nk);
    if (a.F) pack_keys<S>(kf, FP, a.F, a.kf, a.kf_ring, a, h, h.hf, a.HF, s.j0, s.nz);
  }

  // `state` is S, z at the chunk's start, `next` at its end.
  T chunk(const Span& s, const T* state, const T* next) {
    const int64_t N = round_up<T>(s.n), state_size = a.F * VP;
    pack_tokens<S>(q, KP, a.K, a.q, h, h.hq, s.i0, s.n);
    transpose(qt, C, q, KP, s.n, a.K, T(a.scale));
    pack_keys<S>(k, KP, a.K, a.k, a.k_ring, a, h, h.hkv, a.HKV, s.j0, s.nk);
    pack_keys_of(s);
    gemm<T>(s.nk, N, a.K, k, KP, 1, qt, C, pair.scores, C, false);
    decay_of_chunk(decay, a, h, s, C);
    windows_of_chunk(windows, a, h, s);
    if (a.F) {
      pack_tokens<S>(qf, FP, a.F, a.qf, h, h.hq, s.i0, s.n);
      transpose(qft, C, qf, FP, s.n, a.F, T(1));
      if (channels.any) {
        similarities(pair.da, C, kf, qft, channels, a, s);
        decay_queries(qet, qft, C, channels, a, s);
      } else {
        gemm<T>(s.nz, N, a.F, kf, FP, 1, qft, C, pair.da, C, false);
      }
    }
    const T* sink = sinks_of_chunk(sinks, a, h, s);
    weigh(pair.weights, m, sum, pair.scores, pair.da, sink, C, mix, a, s, windows, decay);
    for (int64_t c = 0; a.F && c < N; c += L) {
      Vec<T> den = {};
      for (int64_t f = 0; f < a.F; ++f) den = fma(set1(state[state_size + f]), load(qet + f * C + c), den);
      store(sum + c, fma(den, load(decay.from_start + c), load(sum + c)));
    }

    // u, then c
    pack_tokens<S>(u, VP, a.V, args.dO, h, h.hq, s.i0, s.n);
    for (int64_t r = 0; r < s.n; ++r) {
      const Vec<T> share = set1(T(1) / sum[r]);
      for (int64_t x = 0; x < VP; x += L) store(u + r * VP + x, load(u + r * VP + x) * share);
    }
    for (int64_t r = s.n; r < N; ++r) sum[r] = T(1);
    transpose(ut, C, u, VP, s.n, a.V, T(1));
    gemm<T>(s.nk, N, a.V, v, VP, 1, ut, C, pair.x, C, false);
    if (a.F) gemm<T>(a.F, N, a.V, state, VP, 1, ut, C, su, C, false);
    for (int64_t c = 0; c < N; c += L) {
      Vec<T> dot = column_dot(pair.weights, pair.x, C, s.nk, c);
      if (a.F) dot = fma(column_dot(qet, su, C, a.F, c), load(decay.from_start + c), dot);
      store(c_of + c, dot / load(sum + c));
    }
    const T* dlse = static_cast<const T*>(args.dlse);
    for (int64_t r = 0; dlse && r < s.n; ++r) c_of[r] -= dlse[query_row(s) + r * a.HQ] / sum[r];
    const T dmix = score_gradients(pair, dsinks, sink, m, c_of, C, mix, a, s, windows, decay);
    T* const dsink = static_cast<T*>(args.dsink);
    for (int64_t r = 0; dsink && r < s.n; ++r) dsink[query_row(s) + r * a.HQ] = dsinks[r];

    // softmax part
    T* const dk = static_cast<T*>(args.dk) + row_of(s.j0) * KP;
    T* const dv = static_cast<T*>(args.dv) + row_of(s.j0) * VP;
    const Vec<T> scale = set1(T(a.scale));
    for (int64_t x = 0; x < s.n * KP; x += L) store(q + x, load(q + x) * scale);
    gemm<T>(s.nk, KP, s.n, pair.x, C, 1, q, KP, dk, KP, true);
    gemm<T>(s.nk, VP, s.n, pair.weights, C, 1, u, VP, dv, VP, true);
    gemm<T>(s.n, KP, s.nk, pair.x, 1, C, k, KP, q, KP, false);
    store_rows<S>(static_cast<S*>(args.dq) + query_row(s) * a.K, a.HQ * a.K, q, KP, s.n, a.K, T(a.scale));
    if (a.F) features(s, state, next, dv);
    return dmix;
  }

  // The linear part: features of queries and keys, values through the state, decays, and the state's own gradient.
  void features(const Span& s, const T* state, const T* next, T* dv) {
    const int64_t N = round_up<T>(s.n), state_size = a.F * VP;
    // queries: su becomes their gradient, transposed
    for (int64_t c = 0; c < N; c += L) {
      const Vec<T> e = load(decay.from_start + c), shift = load(c_of + c);
      for (int64_t f = 0; f < a.F; ++f)
        store(su + f * C + c, e * (load(su + f * C + c) - shift * set1(state[state_size + f])));
    }
    if (channels.any) {
      decay_queries(su, su, C, channels, a, s);
      add_query_gradients(su, C, pair.da, kf, channels, a, s);
    } else {
      gemm<T>(a.F, N, s.nz, kf, 1, FP, pair.da, C, su, C, true);
    }
    for (int64_t c = 0; c < N; c += L) store(dG + c, column_dot(qft, su, C, a.F, c));
    transpose(q, FP, su, C, a.F, s.n, T(1));
    store_rows<S>(static_cast<S*>(args.dqf) + query_row(s) * a.F, a.HQ * a.F, q, FP, s.n, a.F, T(1));

    if (channels.any) channel_gates(s, next);

    // keys of the zone: by the queries of this chunk, then by the state at its end
    T* const dkf = static_cast<T*>(args.dkf) + row_of(s.j0) * FP;
    if (s.nz > 0) {
      const int64_t Z = round_up<T>(s.nz);
      if (channels.any) {
        add_key_gradients(dkf, pair.da, C, qf, channels, a, s);
      } else {
        gemm<T>(s.nz, FP, s.n, pair.da, C, 1, qf, FP, dkf, FP, true);
      }
      transpose(vt, Z, v, VP, s.nz, a.V, T(1));
      gemm<T>(a.F, Z, a.V, dS, VP, 1, vt, Z, dkft, Z, false);
      for (int64_t j = 0; j < s.nz; ++j) {
        const int64_t l = leaves_at(a, s, j);
        if (channels.any) {
          const T* power = channels.rows + (s.n - 1 - l) * FP;
          for (int64_t f = 0; f < a.F; ++f) {
            dkf[j * FP + f] += power[f] * (dkft[f * Z + j] + dz[f]);
            dchannels[f] -= T(l + 1) * kf[j * FP + f] * dkf[j * FP + f];
            kf[j * FP + f] *= power[f];
          }
          continue;
        }
        const T t = decay.any ? decay.to_end[l] : T(1);
        for (int64_t f = 0; f < a.F; ++f) dkf[j * FP + f] += t * (dkft[f * Z + j] + dz[f]);
        dG[l] -= row_dot(kf + j * FP, dkf + j * FP, FP);
        for (int64_t f = 0; f < FP; f += L) store(kf + j * FP + f, load(kf + j * FP + f) * set1(t));
      }
      gemm<T>(s.nz, VP, a.F, kf, FP, 1, dS, VP, dv, VP, true);
    }
    if (args.dg && !channels.any) gate(s, next);

    // the state at the start
    for (int64_t f = 0; f < a.F; ++f) {
      const T whole = channels.any ? channels.rows[s.n * FP + f] : decay.whole;
      for (int64_t x = 0; x < VP; x += L) store(dS + f * VP + x, load(dS + f * VP + x) * set1(whole));
      Vec<T> den = {};
      for (int64_t c = 0; c < N; c += L) {
        const Vec<T> scaled = load(qet + f * C + c) * load(decay.from_start + c);
        den = fma(scaled, load(c_of + c), den);
        store(qet + f * C + c, scaled);
      }
      dz[f] = whole * dz[f] - reduce_add<T>(den);
    }
    gemm<T>(a.F, VP, s.n, qet, C, 1, u, VP, dS, VP, true);
  }

  // A decay per channel: the share of a pair in dg_f is its length i - l(j) times its part of the product, which sums
  // to i qf_if dqf_if over the queries less l(j) kf_jf dkf_jf over the keys. Points are counted from before the chunk,
  // where the state is a key; at its end the state is a query. The keys' part is taken where dkf is whole.
  void channel_gates(const Span& s, const T* next) {
    for (int64_t f = 0; f < a.F; ++f) {
      Vec<T> sum = {};
      for (int64_t c = 0; c < s.n; c += L) {
        const Vec<T> point = lane_numbers<T>() + set1(T(c + 1));
        sum = fma(point * load(qft + f * C + c), load(su + f * C + c), sum);
      }
      const T end = row_dot(next + f * VP, dS + f * VP, VP) + next[a.F * VP + f] * dz[f];
      dchannels[f] += reduce_add<T>(sum) + T(s.n) * end;
    }
  }

  // dG_i is the gradient of the running sum of g up to i; what crosses the chunk's end is the state's share.
  void gate(const Span& s, const T* next) {
    T running = row_dot(next, dS, a.F * VP);
    for (int64_t f = 0; f < a.F; ++f) running += next[a.F * VP + f] * dz[f];
    T* dg = static_cast<T*>(args.dg) + query_row(s);
    for (int64_t r = s.n - 1; r >= 0; --r) {
      running += dG[r];
      dg[r * a.HQ] = running;
    }
  }
};

}  // namespace

template <typename S>
static void backward_head(const BackwardArgs& args, int64_t n, int64_t hq) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  Sweep<S> sweep(args, n, hq);
  const Inputs& a = args.in;
  const Head& h = sweep.h;
  const int64_t C = sweep.C, VP = sweep.VP, FP = sweep.FP;
  int64_t chunks = 0;
  for (int64_t i = 0; i < h.length; ++chunks) i += span_at(a, h, i, C, h.length).n;

  size_t bytes = 0;
  sweep.lay_out([&](int64_t count) {
    bytes += Scratch::take_bytes<T>(count);
    return static_cast<T*>(nullptr);
  });
  const int64_t state_size = a.F * VP + FP;
  Scratch memory(bytes + Scratch::take_bytes<T>((chunks + 1) * state_size) + Scratch::take_bytes<int64_t>(chunks + 1));
  sweep.lay_out([&](int64_t count) { return memory.take<T>(count); });
  T* states = memory.take<T>((chunks + 1) * state_size);
  int64_t* starts = memory.take<int64_t>(chunks + 1);

  powers_of_head(sweep.channels, a, h, C);
  load_state(states, states + a.F * VP, VP, a, h);
  starts[0] = 0;
  for (int64_t x = 0; x < chunks; ++x) {
    const Span s = span_at(a, h, starts[x], C, h.length);
    starts[x + 1] = starts[x] + s.n;
    if (a.F == 0) continue;
    T* state = states + (x + 1) * state_size;
    __builtin_memcpy(state, state - state_size, size_t(state_size) * sizeof(T));
    sweep.pack_keys_of(s);
    if (sweep.channels.any) {
      advance_state(state, state + a.F * VP, VP, sweep.kf, sweep.v, sweep.channels, a, s);
      continue;
    }
    decay_of_chunk(sweep.decay, a, h, s, C);
    advance_state(state, state + a.F * VP, VP, sweep.kf, FP, sweep.v, a, s, sweep.decay);
  }

  // The end state is one per state head: its gradient belongs to the first of the query heads that share it.
  const bool owner = args.dS && hq % (a.HQ / a.HS) == 0;
  for (int64_t f = 0; f < FP; ++f) sweep.dz[f] = sweep.dchannels[f] = T(0);
  for (int64_t f = 0; f < a.F; ++f) {
    const int64_t at = (n * a.HS + h.hs) * a.F + f;
    for (int64_t x = 0; x < VP; x += L) {
      const int64_t left = max64(min64(a.V - x, L), 0);
      store(sweep.dS + f * VP + x, owner ? load_as(static_cast<const T*>(args.dS) + at * a.V + x, left) : zero<T>());
    }
    if (owner) sweep.dz[f] = static_cast<const T*>(args.dz)[at];
  }
  T dmix = 0;
  for (int64_t x = chunks - 1; x >= 0; --x) {
    const Span s = span_at(a, h, starts[x], C, h.length);
    dmix += sweep.chunk(s, states + x * state_size, states + (x + 1) * state_size);
  }
  if (args.dmix) static_cast<T*>(args.dmix)[n * a.HQ + hq] = dmix;
  for (int64_t f = 0; args.dg && a.per_channel && f < a.F; ++f)
    static_cast<T*>(args.dg)[(n * a.HQ + hq) * a.F + f] = sweep.dchannels[f];
  if (!args.dS0) return;
  T* dS0 = static_cast<T*>(args.dS0) + (n * a.HQ + hq) * a.F * a.V;
  store_rows<T>(dS0, a.V, sweep.dS, VP, a.F, a.V, T(1));
  for (int64_t f = 0; f < a.F; ++f) static_cast<T*>(args.dz0)[(n * a.HQ + hq) * a.F + f] = sweep.dz[f];
}

template <typename S>
static void reduce_head(const ReduceArgs& args, int64_t n, int64_t head) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const Inputs& a = args.in;
  const int64_t group = a.HQ / args.H;
  const Head h = head_of(a, n, head * group);
  const T* base =
      static_cast<const T*>(args.partial) +
      (h.hq * args.rows + (a.packed ? h.first : n * a.length) + (a.position ? (n + 1) * a.ring : 0)) * args.D_pad;
  for (int64_t j = -h.past; j < h.length; ++j) {
    S* out = static_cast<S*>(args.out) + ((h.batch * a.length + h.first + j) * args.H + head) * args.D;
    T* past =
        j < 0 ? static_cast<T*>(args.past) + ((n * args.H + head) * a.ring + (h.start + j) % a.ring) * args.D : nullptr;
    for (int64_t d = 0; d < args.D; d += L) {
      Vec<T> sum = {};
      for (int64_t x = 0; x < group; ++x) sum += load(base + (x * args.rows + j) * args.D_pad + d);
      const int64_t left = min64(L, args.D - d);
      if (past) {
        store_as(past + d, sum, left);
      } else if (left == L) {
        store_as(out + d, sum);
      } else {
        store_as(out + d, sum, left);
      }
    }
  }
}

template <typename S>
static void backward_tasks(const BackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) backward_head<S>(args, task / args.in.HQ, task % args.in.HQ);
}

template <typename S>
static void reduce_tasks(const ReduceArgs& args, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) reduce_head<S>(args, task / args.H, task % args.H);
}

void backward(const BackwardArgs& args, int64_t begin, int64_t end) noexcept {
  with_element(args.in.element, [&]<typename S>(S) { backward_tasks<S>(args, begin, end); });
}

void reduce(const ReduceArgs& args, int64_t begin, int64_t end) noexcept {
  with_element(args.in.element, [&]<typename S>(S) { reduce_tasks<S>(args, begin, end); });
}

}  // namespace fastweights::attention::FW_LEVEL
