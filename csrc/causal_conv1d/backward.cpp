#include "causal_conv1d/taps.h"
#include "core/element.h"

namespace fastweights::causal_conv1d::FW_LEVEL {

// dz, the gradient of the sums before the activation, from the sums and dy.
template <typename V>
FW_INLINE V through_activation(const Problem& p, V sum, V dy) {
  return p.silu ? dy * silu_derivative(sum, sigmoid(sum)) : dy;
}

// kTokens rows. in[r + w] is what tap w of output r reads; dz[W - 1 + r] the row for dz of output r, dz[0, W - 1) those
// of the outputs before. Together they give the gradients of inputs W - 1 tokens before: dx[r].
template <typename S>
struct BackwardRows {
  const S** in;
  Compute<S>** dz;
  const S* dy[kTokens];
  S* dx[kTokens];
  Compute<S>* partial;  // null: these outputs belong to another tile
};

template <int kW, typename S>
FW_INLINE void backward_rows(const Problem& p, const BackwardRows<S>& rows, const Compute<S>* weight,
                             const Compute<S>* bias, int64_t n) {
  using T = Compute<S>;
  const int64_t W = kW ? kW : p.W;
  for_vectors<T>(n, [&](int64_t j, auto part) {
    Vec<T> g[kTokens];
    const Vec<T> start = bias ? load_as(bias + j, part) : zero<T>();
    FW_UNROLL
    for (int r = 0; r < kTokens; ++r) g[r] = start;
    for_taps<kW>(W, [&](int64_t w) {
      const Vec<T> tap = load_as(weight + w * p.D + j, part);
      FW_UNROLL
      for (int r = 0; r < kTokens; ++r) g[r] = fma(tap, load_as(rows.in[r + w] + j, part), g[r]);
    });
    FW_UNROLL
    for (int r = 0; r < kTokens; ++r) {
      g[r] = through_activation(p, g[r], load_as(rows.dy[r] + j, part));
      store(rows.dz[W - 1 + r] + j, g[r]);
    }
    if (rows.partial) {
      for_taps<kW>(W, [&](int64_t w) {
        T* to = rows.partial + w * p.D + j;
        Vec<T> sum = load_as(to, part);
        FW_UNROLL
        for (int r = 0; r < kTokens; ++r) sum = fma(g[r], load_as(rows.in[r + w] + j, part), sum);
        store_as(to, sum, part);
      });
      T* to = rows.partial + W * p.D + j;
      store_as(to, load_as(to, part) + ((g[0] + g[1]) + (g[2] + g[3])), part);
    }
    Vec<T> d[kTokens] = {};
    for_taps<kW>(W, [&](int64_t w) {
      const Vec<T> tap = load_as(weight + (W - 1 - w) * p.D + j, part);
      FW_UNROLL
      for (int r = 0; r < kTokens; ++r) d[r] = fma(tap, load(rows.dz[r + w] + j), d[r]);
    });
    FW_UNROLL
    for (int r = 0; r < kTokens; ++r) store_as(rows.dx[r] + j, d[r], part);
  });
}

// What the initial state of a segment receives: from `past`, the gradient of the W - 1 inputs before it, and from the
// final state, as far as that is still the initial one.
template <typename S>
FW_INLINE void store_initial(const BackwardArgs& a, const Segment& segment, int64_t channel, const S* past,
                             int64_t past_step) {
  if (!a.dinitial.data || segment.initial < 0) return;
  const int64_t length = segment.end - segment.begin, unseen = a.p.S - a.p.W + 1;
  for (int64_t i = 0; i < a.p.S; ++i) {
    Compute<S> d = i < unseen ? 0 : to_compute(past[(i - unseen) * past_step]);
    if (i >= length && segment.final >= 0 && a.dfinal.data)
      d += to_compute(*at<S>(a.dfinal, segment.final, channel, i - length));
    *at<S>(a.dinitial, segment.initial, channel, i) = from_compute<S>(d);
  }
}

// Adds the gradient of the final state to those of the tile's inputs that it holds.
template <typename S>
FW_INLINE void add_final(const BackwardArgs& a, const Block& block) {
  const Tile& tile = a.p.tiles[block.tile];
  const Segment& segment = a.p.segments[tile.segment];
  if (!a.dfinal.data || segment.final < 0) return;
  const int64_t kept = segment.end - a.p.S, first = kept > tile.begin ? kept : tile.begin;
  for (int64_t j = block.first; j < block.first + block.n; ++j) {
    for (int64_t t = first; t < tile.end; ++t) {
      S* dx = at<S>(a.dx, segment.batch, t, j);
      *dx = from_compute<S>(to_compute(*dx) + to_compute(*at<S>(a.dfinal, segment.final, j, t - kept)));
    }
  }
}

template <typename S>
struct RowScratch {
  const S** in;       // W - 1 + kTokens
  Compute<S>** dz;    // W - 1 + kTokens rows
  S *past, *dpast;    // W - 1 rows each, of inputs before the segment and of their gradients
  S *nothing, *junk;  // a row of zeros, and one that nobody reads
};

template <int kW, typename S>
static void backward_row_tile(const BackwardArgs& a, const Block& block, const RowScratch<S>& s) {
  using T = Compute<S>;
  const Problem& p = a.p;
  const Tile& tile = p.tiles[block.tile];
  const Segment& segment = p.segments[tile.segment];
  const int64_t before = p.W - 1;
  const T* weight = static_cast<const T*>(p.weight) + block.first;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + block.first : nullptr;
  T* partial = static_cast<T*>(a.partial) + block.tile * (p.W + 1) * p.D + block.first;
  for (int64_t w = 0; w <= p.W; ++w) clear(partial + w * p.D, block.n);
  for (int64_t i = 0; i < before; ++i) clear(s.dz[i], kRowChannels);
  load_past(p, segment, block, s.past);

  BackwardRows<S> rows;
  rows.in = s.in, rows.dz = s.dz;
  // Outputs of the next tile that read this one's inputs are computed again.
  for (int64_t t = tile.begin; t - before < tile.end; t += kTokens) {
    for (int64_t i = 0; i < before + kTokens; ++i) {
      const int64_t from = t - before + i, row = (from - segment.begin + before) * kRowChannels;
      s.in[i] = from < segment.begin ? s.past + row
                : from < segment.end ? at<S>(p.x, segment.batch, from, block.first)
                                     : s.nothing;
    }
    for (int64_t r = 0; r < kTokens; ++r) {
      const int64_t to = t - before + r, row = (to - segment.begin + before) * kRowChannels;
      rows.dy[r] = t + r < segment.end ? at<S>(a.dy, segment.batch, t + r, block.first) : s.nothing;
      rows.dx[r] = to >= tile.end       ? s.junk
                   : to >= tile.begin   ? at<S>(a.dx, segment.batch, to, block.first)
                   : to < segment.begin ? s.dpast + row
                                        : s.junk;
    }
    // A tile that is not the segment's last is a whole number of kTokens; what lies behind the last one is zero.
    rows.partial = t < tile.end ? partial : nullptr;
    backward_rows<kW>(p, rows, weight, bias, block.n);
    // The rows of the latest dz become those before; the pointers go round.
    for (int k = 0; k < kTokens; ++k) {
      T* first = s.dz[0];
      for (int64_t i = 0; i + 1 < before + kTokens; ++i) s.dz[i] = s.dz[i + 1];
      s.dz[before + kTokens - 1] = first;
    }
  }
  if (tile.begin == segment.begin)
    for (int64_t j = 0; j < block.n; ++j) store_initial(a, segment, block.first + j, s.dpast + j, kRowChannels);
}

// x holds the tile's inputs, with W - 1 before and behind; dy and dz its outputs, with W - 1 behind; dpast W - 1.
template <typename S>
struct LineScratch {
  Compute<S>*x, *dy, *dz;
  S* dpast;
};

template <int kW, typename S>
static void backward_line(const BackwardArgs& a, const Tile& tile, int64_t index, int64_t channel,
                          const LineScratch<S>& s) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const Problem& p = a.p;
  const Segment& segment = p.segments[tile.segment];
  const int64_t before = p.W - 1, n = tile.end - tile.begin;
  const int64_t behind = segment.end - tile.end < before ? segment.end - tile.end : before;
  const Taps<kW, T> taps(p, channel);
  const Vec<T> bias = p.bias ? set1(static_cast<const T*>(p.bias)[channel]) : zero<T>();
  const S* dy = at<S>(a.dy, segment.batch, tile.begin, channel);

  const auto differentiate = [&](int64_t j) {
    Vec<T> sum = bias;
    for_taps<kW>(p.W, [&](int64_t w) { sum = fma(taps[w], load(s.x + j + w), sum); });
    const Vec<T> dz = through_activation(p, sum, load(s.dy + j));
    store(s.dz + j, dz);
    return dz;
  };
  load_line<S>(p, segment, channel, tile.begin - before, tile.end, s.x);
  load_elements(dy, n, T(1), s.dy);
  // The prefetcher of the machine stops at the end of a line.
  const S* next_x = at<S>(p.x, segment.batch, tile.begin, channel + 1);
  const S *next_dy = dy + a.dy.channel, *next_dx = at<S>(a.dx, segment.batch, tile.begin, channel + 1);
  Vec<T> total = zero<T>();
  for (int64_t j = 0; j < n; j += L) {
    prefetch(next_x + j), prefetch(next_dy + j), prefetch(next_dx + j);
    total += differentiate(j);
  }

  T* partial = static_cast<T*>(a.partial) + index * (p.W + 1) * p.D + channel;
  constexpr int kSums = kW > 0 ? kW : 1;
  for (int64_t w = 0; w < p.W; w += kSums) {
    Vec<T> sums[kSums] = {};
    for (int64_t j = 0; j < n; j += L) {
      const Vec<T> dz = load(s.dz + j);
      FW_UNROLL
      for (int i = 0; i < kSums; ++i) sums[i] = fma(dz, load(s.x + j + w + i), sums[i]);
    }
    for (int i = 0; i < kSums; ++i) partial[(w + i) * p.D] = reduce_add<T>(sums[i]);
  }
  partial[p.W * p.D] = reduce_add<T>(total);

  // Outputs of the next tile that read this one's inputs are computed again.
  load_line<S>(p, segment, channel, tile.end, tile.end + behind, s.x + before + n);
  load_elements(dy + n, behind, T(1), s.dy + n);
  for (int64_t j = n; j < n + behind; j += L) differentiate(j);
  clear(s.dz + n + behind, before - behind + L);

  // The input at tile.begin + i sits at tap W - 1 - w of the output w tokens later.
  const auto input_gradient = [&](int64_t i) {
    Vec<T> sum = zero<T>();
    for_taps<kW>(p.W, [&](int64_t w) { sum = fma(taps[(kW > 0 ? kW - 1 : before) - w], load(s.dz + i + w), sum); });
    return sum;
  };
  S* dx = at<S>(a.dx, segment.batch, tile.begin, channel);
  for_vectors<T>(n, [&](int64_t j, auto part) { store_as(dx + j, input_gradient(j), part); });
  if (tile.begin != segment.begin) return;
  for (int64_t i = 0; i < before; ++i) {
    T sum = 0;
    for (int64_t w = before - i; w < p.W; ++w) sum += taps[before - w][0] * s.dz[i - before + w];
    s.dpast[i] = from_compute<S>(sum);
  }
  store_initial(a, segment, channel, s.dpast, 1);
}

template <int kW, typename S>
static void backward_row_tasks(const BackwardArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const int64_t before = a.p.W - 1, rows = before + kTokens;
  Scratch scratch(2 * Scratch::take_bytes<S*>(rows) + Scratch::take_bytes<T>(rows * kRowChannels) +
                  2 * Scratch::take_bytes<S>(before * kRowChannels) + 2 * Scratch::take_bytes<S>(kRowChannels));
  RowScratch<S> s;
  s.in = scratch.take<const S*>(rows), s.dz = scratch.take<T*>(rows);
  T* dz = scratch.take<T>(rows * kRowChannels);
  for (int64_t i = 0; i < rows; ++i) s.dz[i] = dz + i * kRowChannels;
  s.past = scratch.take<S>(before * kRowChannels), s.dpast = scratch.take<S>(before * kRowChannels);
  s.nothing = scratch.take<S>(kRowChannels), s.junk = scratch.take<S>(kRowChannels);
  for (int64_t j = 0; j < kRowChannels; ++j) s.nothing[j] = S{};
  for (int64_t task = begin; task < end; ++task) {
    const Block block = Block::of(a.p, task);
    backward_row_tile<kW>(a, block, s);
    add_final<S>(a, block);
  }
}

template <int kW, typename S>
static void backward_line_tasks(const BackwardArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const int64_t before = a.p.W - 1, x = line_size<T>(2 * before + kLineTokens);
  const int64_t dz = line_size<T>(before + kLineTokens) + kLanes<T>;
  Scratch scratch(Scratch::take_bytes<T>(x) + 2 * Scratch::take_bytes<T>(dz) + Scratch::take_bytes<S>(before));
  LineScratch<S> s;
  s.x = scratch.take<T>(x), s.dy = scratch.take<T>(dz), s.dz = scratch.take<T>(dz), s.dpast = scratch.take<S>(before);
  for (int64_t task = begin; task < end; ++task) {
    const Block block = Block::of(a.p, task);
    for (int64_t j = 0; j < block.n; ++j) backward_line<kW>(a, a.p.tiles[block.tile], block.tile, block.first + j, s);
    add_final<S>(a, block);
  }
}

template <int kW, typename S>
static void backward_tasks(const BackwardArgs& a, int64_t begin, int64_t end) {
  a.p.lines ? backward_line_tasks<kW, S>(a, begin, end) : backward_row_tasks<kW, S>(a, begin, end);
}

template <typename S>
static void backward_of(const BackwardArgs& a, int64_t begin, int64_t end) {
  a.p.W == 4   ? backward_tasks<4, S>(a, begin, end)
  : a.p.W == 3 ? backward_tasks<3, S>(a, begin, end)
               : backward_tasks<0, S>(a, begin, end);
}

void backward(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.p.element, [&]<typename S>(S) { backward_of<S>(a, begin, end); });
}

}  // namespace fastweights::causal_conv1d::FW_LEVEL
