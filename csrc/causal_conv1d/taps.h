// Pieces of the kernels: loops over taps, and what a task reads: rows of channels, or lines of time.
#pragma once

#include "causal_conv1d/kernel.h"
#include "core/rows.h"
#include "core/scratch.h"
#include "core/tail.h"
#include "core/vmath.h"

namespace fastweights::causal_conv1d::FW_LEVEL {
using namespace ::fastweights::FW_LEVEL;

// Tokens that the kernels for rows do at once: each input row is then read once for several outputs.
constexpr int kTokens = 4;

// Calls f(w) for every tap. Widths that models use are constants (kW), which keeps the taps in registers.
template <int kW, typename F>
FW_INLINE void for_taps(int64_t W, const F& f) {
  if constexpr (kW > 0) {
    FW_UNROLL
    for (int w = 0; w < kW; ++w) f(w);
  } else {
    for (int64_t w = 0; w < W; ++w) f(w);
  }
}

// The taps of one channel as vectors. Stores to outputs may change weight, as far as the compiler knows: constants of
// the loop must be copied.
template <int kW, typename T>
struct Taps {
  const T* weight;
  int64_t step;
  Vec<T> held[kW > 0 ? kW : 1];

  Taps(const Problem& p, int64_t channel) : weight(static_cast<const T*>(p.weight) + channel), step(p.D) {
    for_taps<kW>(0, [&](int64_t w) { held[w] = set1(weight[w * step]); });
  }
  Vec<T> operator[](int64_t w) const {
    if constexpr (kW > 0) {
      return held[w];
    } else {
      return set1(weight[w * step]);
    }
  }
};

// The part of the channels that a task does.
struct Block {
  int64_t tile, first, n;

  FW_INLINE Block of(const Problem& p, int64_t task) {
    const int64_t width = p.lines ? kLineChannels : kRowChannels, first = task % p.channel_blocks * width;
    return {task / p.channel_blocks, first, p.D - first < width ? p.D - first : width};
  }
};

// Element (t, channel) of a batch entry.
template <typename S>
FW_INLINE S* at(const Signal& s, int64_t batch, int64_t t, int64_t channel) {
  return static_cast<S*>(s.data) + batch * s.batch + t * s.time + channel * s.channel;
}

template <typename S>
FW_INLINE S* at(const State& s, int64_t sequence, int64_t channel, int64_t i) {
  return static_cast<S*>(s.data) + sequence * s.sequence + channel * s.channel + i * s.time;
}

// The input at token t of a segment, or before it: then its initial state, or zero.
template <typename S>
FW_INLINE S input_at(const Problem& p, const Segment& segment, int64_t t, int64_t channel) {
  if (t >= segment.begin) return *at<S>(p.x, segment.batch, t, channel);
  const int64_t i = p.S + t - segment.begin;
  if (segment.initial < 0 || !p.initial.data || i < 0) return S{};
  return *at<S>(p.initial, segment.initial, channel, i);
}

// Rows of the W - 1 tokens before a segment, kRowChannels apart.
template <typename S>
FW_INLINE void load_past(const Problem& p, const Segment& segment, const Block& block, S* past) {
  for (int64_t i = 0; i < p.W - 1; ++i)
    for (int64_t j = 0; j < block.n; ++j)
      past[i * kRowChannels + j] = input_at<S>(p, segment, segment.begin - p.W + 1 + i, block.first + j);
}

// Numbers that hold `n` elements of a line and what a vector after the last of them reads.
template <typename T>
FW_INLINE int64_t line_size(int64_t n) {
  return n + kLanes<T>;
}

template <typename T>
FW_INLINE void clear(T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = T(0);
}

// The inputs at tokens [begin, end) of a segment, in the type of the arithmetic, and zeros behind them.
template <typename S>
FW_INLINE void load_line(const Problem& p, const Segment& segment, int64_t channel, int64_t begin, int64_t end,
                         Compute<S>* out) {
  for (; begin < segment.begin; ++begin) *out++ = to_compute(input_at<S>(p, segment, begin, channel));
  load_elements(at<S>(p.x, segment.batch, begin, channel), end - begin, Compute<S>(1), out);
  clear(out + end - begin, kLanes<Compute<S>>);
}

}  // namespace fastweights::causal_conv1d::FW_LEVEL
