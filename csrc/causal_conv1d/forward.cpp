#include "causal_conv1d/taps.h"
#include "core/element.h"

namespace fastweights::causal_conv1d::FW_LEVEL {

// R rows of outputs; in[r + w] is what tap w of output r reads.
template <int kW, int R, typename S>
FW_INLINE void convolve(const Problem& p, const S* const* in, S* const* out, const S* const* residual,
                        const Compute<S>* weight, const Compute<S>* bias, int64_t n) {
  using T = Compute<S>;
  for_vectors<T>(n, [&](int64_t j, auto part) {
    Vec<T> sum[R];
    const Vec<T> start = bias ? load_as(bias + j, part) : zero<T>();
    FW_UNROLL
    for (int r = 0; r < R; ++r) sum[r] = start;
    for_taps<kW>(p.W, [&](int64_t w) {
      const Vec<T> tap = load_as(weight + w * p.D + j, part);
      FW_UNROLL
      for (int r = 0; r < R; ++r) sum[r] = fma(tap, load_as(in[r + w] + j, part), sum[r]);
    });
    FW_UNROLL
    for (int r = 0; r < R; ++r) {
      Vec<T> y = p.silu ? silu(sum[r]) : sum[r];
      if (residual) y += load_as(residual[r] + j, part);
      store_as(out[r] + j, y, part);
    }
  });
}

template <int kW, typename S>
static void forward_rows(const ForwardArgs& a, const Block& block, const S** in, S* past) {
  using T = Compute<S>;
  const Problem& p = a.p;
  const Tile& tile = p.tiles[block.tile];
  const Segment& segment = p.segments[tile.segment];
  const T* weight = static_cast<const T*>(p.weight) + block.first;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + block.first : nullptr;
  if (tile.begin < segment.begin + p.W - 1) load_past(p, segment, block, past);
  for (int64_t t = tile.begin; t < tile.end;) {
    const int64_t rows = t + kTokens <= tile.end ? kTokens : 1;
    for (int64_t i = 0; i < p.W - 1 + rows; ++i) {
      const int64_t from = t - p.W + 1 + i, before = from - segment.begin + p.W - 1;
      in[i] = from < segment.begin ? past + before * kRowChannels : at<S>(p.x, segment.batch, from, block.first);
    }
    S* out[kTokens];
    const S* residual[kTokens];
    for (int64_t r = 0; r < rows; ++r) {
      out[r] = at<S>(a.y, segment.batch, t + r, block.first);
      if (a.residual.data) residual[r] = at<S>(a.residual, segment.batch, t + r, block.first);
    }
    const S* const* added = a.residual.data ? residual : nullptr;
    if (rows == kTokens) {
      convolve<kW, kTokens>(p, in, out, added, weight, bias, block.n);
    } else {
      convolve<0, 1>(p, in, out, added, weight, bias, block.n);
    }
    t += rows;
  }
}

template <int kW, typename S>
static void forward_line(const ForwardArgs& a, const Tile& tile, int64_t channel, Compute<S>* x) {
  using T = Compute<S>;
  const Problem& p = a.p;
  const Segment& segment = p.segments[tile.segment];
  load_line<S>(p, segment, channel, tile.begin - p.W + 1, tile.end, x);
  const Taps<kW, T> taps(p, channel);
  const Vec<T> bias = p.bias ? set1(static_cast<const T*>(p.bias)[channel]) : zero<T>();
  // The prefetcher of the machine stops at the end of a line.
  const S* next = at<S>(p.x, segment.batch, tile.begin, channel + 1);
  S* out = at<S>(a.y, segment.batch, tile.begin, channel);
  const S* residual = a.residual.data ? at<S>(a.residual, segment.batch, tile.begin, channel) : nullptr;
  for_vectors<T>(tile.end - tile.begin, [&](int64_t j, auto part) {
    prefetch(next + j);
    Vec<T> y = bias;
    for_taps<kW>(p.W, [&](int64_t w) { y = fma(taps[w], load(x + j + w), y); });
    if (p.silu) y = silu(y);
    if (residual) y += load_as(residual + j, part);
    store_as(out + j, y, part);
  });
}

template <typename S>
static void store_final(const ForwardArgs& a, const Block& block) {
  const Tile& tile = a.p.tiles[block.tile];
  const Segment& segment = a.p.segments[tile.segment];
  if (!a.final.data || segment.final < 0 || tile.end != segment.end) return;
  for (int64_t j = block.first; j < block.first + block.n; ++j)
    for (int64_t i = 0; i < a.p.S; ++i)
      *at<S>(a.final, segment.final, j, i) = input_at<S>(a.p, segment, segment.end - a.p.S + i, j);
}

template <int kW, typename S>
static void forward_tasks(const ForwardArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const Problem& p = a.p;
  const int64_t pointers = p.lines ? 0 : p.W - 1 + kTokens, past = p.lines ? 0 : (p.W - 1) * kRowChannels;
  const int64_t line = p.lines ? line_size<T>(p.W - 1 + kLineTokens) : 0;
  Scratch scratch(Scratch::take_bytes<S*>(pointers) + Scratch::take_bytes<S>(past) + Scratch::take_bytes<T>(line));
  const S** in = scratch.take<const S*>(pointers);
  S* rows = scratch.take<S>(past);
  T* x = scratch.take<T>(line);
  for (int64_t task = begin; task < end; ++task) {
    const Block block = Block::of(p, task);
    if (p.lines) {
      for (int64_t j = 0; j < block.n; ++j) forward_line<kW, S>(a, p.tiles[block.tile], block.first + j, x);
    } else {
      forward_rows<kW, S>(a, block, in, rows);
    }
    store_final<S>(a, block);
  }
}

template <typename S>
static void forward_of(const ForwardArgs& a, int64_t begin, int64_t end) {
  a.p.W == 4   ? forward_tasks<4, S>(a, begin, end)
  : a.p.W == 3 ? forward_tasks<3, S>(a, begin, end)
               : forward_tasks<0, S>(a, begin, end);
}

void forward(const ForwardArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.p.element, [&]<typename S>(S) { forward_of<S>(a, begin, end); });
}

}  // namespace fastweights::causal_conv1d::FW_LEVEL
