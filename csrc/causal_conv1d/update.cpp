#include "causal_conv1d/taps.h"
#include "core/element.h"

namespace fastweights::causal_conv1d::FW_LEVEL {

// One token of a block of channels: the sums before the activation, and the state in `row` moved on.
template <int kW, typename S>
FW_INLINE void advance(const UpdateArgs& a, int64_t b, int64_t row, int64_t token, int64_t first, int64_t n,
                       Compute<S>* sums) {
  using T = Compute<S>;
  const T *weight = static_cast<const T*>(a.weight) + first, *bias = static_cast<const T*>(a.bias);
  const S* x = at<S>(a.x, b, token, first);
  const int64_t W = kW ? kW : a.W, kept = a.S, step = a.state.time;
  for (int64_t j = 0; j < n; ++j) {
    S* state = at<S>(a.state, row, first + j, 0);
    const S* seen = state + (kept - W + 1) * step;
    T sum = bias ? bias[first + j] : T(0);
    for_taps<kW ? kW - 1 : 0>(W - 1, [&](int64_t w) { sum += weight[w * a.D + j] * to_compute(seen[w * step]); });
    sums[j] = sum + weight[(W - 1) * a.D + j] * to_compute(x[j]);
    for (int64_t i = 1; i < kept; ++i) state[(i - 1) * step] = state[i * step];
    if (kept) state[(kept - 1) * step] = x[j];
  }
}

// The same where the state is a ring: the token takes the place of the oldest input, nothing else moves.
template <typename S>
FW_INLINE void advance_ring(const UpdateArgs& a, int64_t b, int64_t row, int64_t token, int64_t first, int64_t n,
                            Compute<S>* sums) {
  using T = Compute<S>;
  const T *weight = static_cast<const T*>(a.weight) + first, *bias = static_cast<const T*>(a.bias);
  const S* x = at<S>(a.x, b, token, first);
  const int64_t seen = a.W - 1, slot = a.S ? (a.slots[b] + token) % a.S : 0;
  for (int64_t j = 0; j < n; ++j) sums[j] = bias ? bias[first + j] : T(0);
  for (int64_t w = 0; w < seen; ++w) {
    const int64_t from = slot - seen + w, wrapped = from < 0 ? from + a.S : from;
    for (int64_t j = 0; j < n; ++j)
      sums[j] += weight[w * a.D + j] * to_compute(*at<S>(a.state, row, first + j, wrapped));
  }
  for (int64_t j = 0; j < n; ++j) {
    sums[j] += weight[seen * a.D + j] * to_compute(x[j]);
    if (a.S) *at<S>(a.state, row, first + j, slot) = x[j];
  }
}

template <int kW, typename S>
static void update_tasks(const UpdateArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  Scratch scratch(Scratch::take_bytes<T>(kRowChannels));
  T* sums = scratch.take<T>(kRowChannels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.channel_blocks, first = task % a.channel_blocks * kRowChannels;
    const int64_t n = a.D - first < kRowChannels ? a.D - first : kRowChannels, row = a.rows ? a.rows[b] : b;
    for (int64_t token = 0; token < a.L; ++token) {
      a.slots ? advance_ring<S>(a, b, row, token, first, n, sums) : advance<kW, S>(a, b, row, token, first, n, sums);
      S* out = at<S>(a.y, b, token, first);
      const S* residual = a.residual.data ? at<S>(a.residual, b, token, first) : nullptr;
      for_vectors<T>(n, [&](int64_t j, auto part) {
        Vec<T> y = load(sums + j);
        if (a.silu) y = silu(y);
        if (residual) y += load_as(residual + j, part);
        store_as(out + j, y, part);
      });
    }
  }
}

template <typename S>
static void update_of(const UpdateArgs& a, int64_t begin, int64_t end) {
  a.W == 4 ? update_tasks<4, S>(a, begin, end) : update_tasks<0, S>(a, begin, end);
}

void update(const UpdateArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.element, [&]<typename S>(S) { update_of<S>(a, begin, end); });
}

}  // namespace fastweights::causal_conv1d::FW_LEVEL
