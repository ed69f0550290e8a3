#include "linear_attention/recurrent.h"

namespace fastweights::linear_attention::FW_LEVEL {

// The rows of S are swept whole: narrower strips waste the memory's bursts.
template <typename T>
static void step_tasks(const StepArgs& a, int64_t begin, int64_t end) {
  const int64_t Kp = padded<T>(a.K), Vp = padded<T>(a.V), lanes = kLanes<T>, whole = a.V / lanes * lanes;
  const bool channel = a.gate == Gate::channel;
  Scratch scratch(3 * Scratch::take_bytes<T>(Kp) + 2 * Scratch::take_bytes<T>(Vp));
  T *q = scratch.take<T>(Kp), *k = scratch.take<T>(Kp), *decay = scratch.take<T>(Kp);
  T *v = scratch.take<T>(Vp), *o = scratch.take<T>(Vp);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.HV, head = task % a.HV, key_head = head / (a.HV / a.H);
    load_row(a.q, b * a.q.batch + key_head * a.q.head, a.K, T(a.scale), q);
    load_row(a.k, b * a.k.batch + key_head * a.k.head, a.K, T(1), k);
    load_row(a.v, b * a.v.batch + head * a.v.head, a.V, T(1), v);
    if (a.gate == Gate::none) {
      decay[0] = T(1);
    } else {
      load_row(a.g, b * a.g.batch + head * a.g.head, channel ? a.K : 1, T(1), decay);
      for (int64_t j = 0; j < (channel ? Kp : 1); j += lanes) store(decay + j, exp(load(decay + j)));
    }
    for (int64_t j = 0; j < Vp; ++j) o[j] = T(0);
    T* S = static_cast<T*>(a.state.S) + b * a.state.sequence + head * a.state.head;
    advance(a.K, whole, S, a.state.key, q, k, v, decay, int64_t(channel), o);
    for (int64_t j = whole; j < a.V; ++j) {
      for (int64_t i = 0; i < a.K; ++i) {
        T& s = S[i * a.state.key + j];
        s = s * decay[channel ? i : 0] + k[i] * v[j];
        o[j] += q[i] * s;
      }
    }
    if (a.normalize) {
      T* z = static_cast<T*>(a.state.z) + b * a.HV * a.K + head * a.K;
      T n = T(a.eps);
      for (int64_t i = 0; i < a.K; ++i) {
        z[i] = z[i] * decay[channel ? i : 0] + k[i];
        n += q[i] * z[i];
      }
      for (int64_t j = 0; j < a.V; ++j) o[j] /= n;
    }
    store_row(a.o, b * a.o.batch + head * a.o.head, a.V, o);
  }
}

void step(const StepArgs& a, int64_t begin, int64_t end) noexcept {
  if (a.q.element == Element::f64) {
    step_tasks<double>(a, begin, end);
  } else {
    step_tasks<float>(a, begin, end);
  }
}

}  // namespace fastweights::linear_attention::FW_LEVEL
