#include "attention/channels.h"
#include "core/element.h"

namespace fastweights::attention::FW_LEVEL {

template <typename S>
static void forward_segment(const ForwardArgs& args, int64_t n, int64_t hq, int64_t segment) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const Inputs& a = args.in;
  const Head h = head_of(a, n, hq);
  const int64_t begin = min64(segment * args.segment_length, h.length);
  const int64_t end = min64(begin + args.segment_length, h.length);
  if (begin == end && segment > 0) return;
  const int64_t C = chunk_size<T>(a), keys = most_keys(a, h, C), zone = most_zone(a, h, C);
  const int64_t KP = round_up<T>(a.K), VP = round_up<T>(a.V), FP = round_up<T>(a.F);

  const int64_t sizes[] = {C * max64(KP, FP), a.K * C, a.F * C, keys * KP, keys * VP, zone * FP, keys * C,
                           zone * C,          C * C,   C * 4,   C * 3,     a.F * VP,  FP,        C * VP};
  size_t bytes = 0;
  for (int64_t size : sizes) bytes += Scratch::take_bytes<T>(size);
  Channels<T> channels;
  lay_out_channels(channels, a, C, zone, FP, [&](int64_t count) {
    bytes += Scratch::take_bytes<T>(count);
    return static_cast<T*>(nullptr);
  });
  Scratch memory(bytes);
  const int64_t* size = sizes;
  T* rows = memory.take<T>(*size++);
  T* qt = memory.take<T>(*size++);
  T* qft = memory.take<T>(*size++);
  T* k = memory.take<T>(*size++);
  T* v = memory.take<T>(*size++);
  T* kf = memory.take<T>(*size++);
  T* w = memory.take<T>(*size++);
  T* similarity = memory.take<T>(*size++);
  Decay<T> decay;
  decay.pair = memory.take<T>(*size++);
  T* per_query = memory.take<T>(*size++);
  decay.from_start = per_query;
  decay.to_end = per_query + C;
  T *m = per_query + 2 * C, *sum = per_query + 3 * C;
  Windows<T> windows;
  windows.lo = memory.take<T>(*size++);
  windows.hi = windows.lo + C;
  T* const sinks = windows.hi + C;
  T* state = memory.take<T>(*size++);
  T* z = memory.take<T>(*size++);
  T* o = memory.take<T>(*size++);
  lay_out_channels(channels, a, C, zone, FP, [&](int64_t count) { return memory.take<T>(count); });

  const T mix = a.mix ? static_cast<const T*>(a.mix)[hq] : T(1);
  load_state(state, z, VP, a, h);
  powers_of_head(channels, a, h, C);
  for (int64_t i0 = begin; i0 < end;) {
    const Span s = span_at(a, h, i0, C, end);
    i0 += s.n;
    const int64_t N = round_up<T>(s.n);
    pack_tokens<S>(rows, KP, a.K, a.q, h, hq, s.i0, s.n);
    transpose(qt, C, rows, KP, s.n, a.K, T(a.scale));
    pack_keys<S>(k, KP, a.K, a.k, a.k_ring, a, h, h.hkv, a.HKV, s.j0, s.nk);
    pack_keys<S>(v, VP, a.V, a.v, a.v_ring, a, h, h.hkv, a.HKV, s.j0, s.nk);
    gemm<T>(s.nk, N, a.K, k, KP, 1, qt, C, w, C, false);
    if (a.F) {
      pack_tokens<S>(rows, FP, a.F, a.qf, h, hq, s.i0, s.n);
      transpose(qft, C, rows, FP, s.n, a.F, T(1));
      pack_keys<S>(kf, FP, a.F, a.kf, a.kf_ring, a, h, h.hf, a.HF, s.j0, s.nz);
      if (channels.any) {
        similarities(similarity, C, kf, qft, channels, a, s);
        decay_queries(qft, qft, C, channels, a, s);
      } else {
        gemm<T>(s.nz, N, a.F, kf, FP, 1, qft, C, similarity, C, false);
      }
    }
    decay_of_chunk(decay, a, h, s, C);
    windows_of_chunk(windows, a, h, s);
    weigh(w, m, sum, w, similarity, sinks_of_chunk(sinks, a, h, s), C, mix, a, s, windows, decay);

    if (a.F) {
      gemm<T>(s.n, VP, a.F, qft, 1, C, state, VP, o, VP, false);
      for (int64_t r = 0; decay.any && r < s.n; ++r) {
        const Vec<T> e = set1(decay.from_start[r]);
        for (int64_t x = 0; x < VP; x += L) store(o + r * VP + x, load(o + r * VP + x) * e);
      }
      for (int64_t c = 0; c < N; c += L) {
        Vec<T> den = {};
        for (int64_t f = 0; f < a.F; ++f) den = fma(set1(z[f]), load(qft + f * C + c), den);
        store(sum + c, fma(den, load(decay.from_start + c), load(sum + c)));
      }
    }
    gemm<T>(s.n, VP, s.nk, w, 1, C, v, VP, o, VP, a.F > 0);
    if (channels.any) {
      advance_state(state, z, VP, kf, v, channels, a, s);
    } else if (a.F) {
      advance_state(state, z, VP, kf, FP, v, a, s, decay);
    }

    for (int64_t r = 0; r < s.n; ++r) {
      const int64_t row = (h.batch * a.length + h.first + s.i0 + r) * a.HQ + hq;
      S* out = static_cast<S*>(args.o) + row * a.V;
      const Vec<T> share = set1(T(1) / sum[r]);
      for (int64_t x = 0; x < a.V; x += L) store_as(out + x, load(o + r * VP + x) * share, min64(L, a.V - x));
    }
    for (int64_t c = 0; args.lse && c < N; c += L) store(sum + c, load(m + c) + log(load(sum + c)));
    for (int64_t r = 0; args.lse && r < s.n; ++r)
      static_cast<T*>(args.lse)[(h.batch * a.length + h.first + s.i0 + r) * a.HQ + hq] = sum[r];
  }
  if (!args.S || hq % (a.HQ / a.HS) != 0) return;
  T* S_out = static_cast<T*>(args.S) + (n * a.HS + h.hs) * a.F * a.V;
  for (int64_t f = 0; f < a.F; ++f) {
    for (int64_t x = 0; x < a.V; x += L) store_as(S_out + f * a.V + x, load(state + f * VP + x), min64(L, a.V - x));
    static_cast<T*>(args.z)[(n * a.HS + h.hs) * a.F + f] = z[f];
  }
}

template <typename S>
static void forward_tasks(const ForwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / args.segments;
    forward_segment<S>(args, head / args.in.HQ, head % args.in.HQ, task % args.segments);
  }
}

void forward(const ForwardArgs& args, int64_t begin, int64_t end) noexcept {
  with_element(args.in.element, [&]<typename S>(S) { forward_tasks<S>(args, begin, end); });
}

}  // namespace fastweights::attention::FW_LEVEL
