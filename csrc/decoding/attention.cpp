#include "core/scratch.h"
#include "core/vmath.h"
#include "decoding/kernel.h"

namespace fastweights::decoding::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

constexpr int L = kLanes<float>;

static float dot(const float* a, const float* b, int64_t n) {
  Vec<float> sum = zero<float>();
  int64_t i = 0;
  for (; i + L <= n; i += L) sum = fma(load(a + i), load(b + i), sum);
  if (i < n) sum = fma(load_as(a + i, n - i), load_as(b + i, n - i), sum);
  return reduce_add<float>(sum);
}

// (x, 1) . w
static float affine(const float* x, const float* w, int64_t n) {
  return dot(x, w, n) + w[n];
}

static void rms_norm(float* x, const float* weight, float eps, int64_t n) {
  const float factor = reciprocal_root(dot(x, x, n) / float(n) + eps);
  for (int64_t i = 0; i < n; ++i) x[i] *= factor * weight[i];
}

// The halves of x are the real and imaginary parts of dim / 2 numbers, each turned by its angle.
static void rotate(const float* x, const float* cos, const float* sin, int64_t dim, float* y) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * cos[i] - x[i + half] * sin[i];
    y[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
}

// y = x W, W [dim, columns].
template <int V>
static void product_columns(const float* x, const float* W, int64_t dim, int64_t columns, float* y) {
  Vec<float> sum[V] = {};
  for (int64_t k = 0; k < dim; ++k) {
    const Vec<float> xk = set1(x[k]);
    FW_UNROLL
    for (int i = 0; i < V; ++i) sum[i] = fma(xk, load(W + k * columns + i * L), sum[i]);
  }
  FW_UNROLL
  for (int i = 0; i < V; ++i) store(y + i * L, sum[i]);
}

static void product(const float* x, const float* W, int64_t dim, int64_t columns, float* y) {
  int64_t c = 0;
  for (; c + 8 * L <= columns; c += 8 * L) product_columns<8>(x, W + c, dim, columns, y + c);
  for (; c + L <= columns; c += L) product_columns<1>(x, W + c, dim, columns, y + c);
  for (; c < columns; ++c) {
    float sum = 0.0f;
    for (int64_t k = 0; k < dim; ++k) sum = __builtin_fmaf(x[k], W[k * columns + c], sum);
    y[c] = sum;
  }
}

// x <- exp(x - most), zero beyond n up to whole vectors; returns the sum.
static float exponentials(float* x, float most, int64_t n) {
  Vec<float> total = zero<float>();
  for (int64_t i = 0; i < n; i += L) {
    const int64_t left = n - i < L ? n - i : L;
    store_as(x + i, exp(load_as(x + i, left) - most), left);
    total += load_as(x + i, left);
  }
  return reduce_add<float>(total);
}

static float largest(const float* x, int64_t n) {
  float most = x[0];
  for (int64_t i = 1; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// gain * [softmax(x W), softmax(-x W)]
static void hedgehog(const float* x, const float* W, const float* gain, int64_t dim, int64_t features, float* out) {
  const int64_t columns = features / 2;
  float factor = 1.0f;
  if (gain) {
    const float log_gain = affine(x, gain, dim);
    factor = exp(log_gain > 15.0f ? 15.0f : log_gain < -15.0f ? -15.0f : log_gain);
  }
  product(x, W, dim, columns, out);
  for (int64_t i = 0; i < columns; ++i) out[columns + i] = -out[i];
  for (float* half = out; half < out + features; half += columns) {
    const float scale = factor / exponentials(half, largest(half, columns), columns);
    for (int64_t i = 0; i < columns; ++i) half[i] *= scale;
  }
}

// A head of q or k of one row, plain and rotated.
struct Head {
  float *plain, *rotated;
};

static void load_head(const AttentionArgs& a, int64_t row, const float* source, const float* norm, const Head& head) {
  for (int64_t i = 0; i < a.dim; ++i) head.plain[i] = source[i];
  if (norm) rms_norm(head.plain, norm, a.norm_eps, a.dim);
  rotate(head.plain, a.cos + row * (a.dim / 2), a.sin + row * (a.dim / 2), a.dim, head.rotated);
}

FW_INLINE const float* projections(const AttentionArgs& a, int64_t row) {
  return a.qkv + row * (a.heads + 2 * a.kv_heads) * a.dim;
}

// The window's part of o [dim], and of the normaliser, which it returns.
static float attend_window(const AttentionArgs& a, const float* q, const float* k, const float* v, const float* k_ring,
                           const float* v_ring, int64_t position, float mix, const float* sink, float* scores,
                           float* o) {
  const int64_t dim = a.dim, slot = position % a.window;
  const int64_t count = position + 1 < a.window ? position + 1 : a.window;
  for (int64_t i = 0; i < count; ++i) scores[i] = a.scale * dot(q, i == slot ? k : k_ring + i * dim, dim);
  float most = largest(scores, count);
  if (sink && *sink > most) most = *sink;
  const float total = exponentials(scores, most, count) + (sink ? exp(*sink - most) : 0.0f);
  for (int64_t c = 0; c < dim; ++c) o[c] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float weight = mix * scores[i];
    const float* value = i == slot ? v : v_ring + i * dim;
    for (int64_t c = 0; c < dim; ++c) o[c] += weight * value[c];
  }
  return mix * total;
}

static void query_task(const AttentionArgs& a, int64_t row, int64_t h, const Head& q, const Head& k, float* scores) {
  const int64_t dim = a.dim, j = h / (a.heads / a.kv_heads), head = row * a.heads + h;
  const float *source = projections(a, row), *key = source + (a.heads + j) * dim, *value = key + a.kv_heads * dim;
  load_head(a, row, source + h * dim, a.q_norm, q);
  load_head(a, row, key, a.k_norm, k);
  hedgehog(a.rotated_features ? q.rotated : q.plain, a.q_map + h * dim * (a.features / 2),
           a.q_gain ? a.q_gain + h * (dim + 1) : nullptr, dim, a.features, a.qf + head * a.features);
  const float sink = a.sink ? affine(q.plain, a.sink + h * (dim + 1), dim) : 0.0f;
  const int64_t ring = (row * a.kv_heads + j) * a.window * dim;
  a.normaliser[head] = attend_window(a, q.rotated, k.rotated, value, a.k_ring + ring, a.v_ring + ring, a.position[row],
                                     a.mix[h], a.sink ? &sink : nullptr, scores, a.o + head * dim);
}

static void key_task(const AttentionArgs& a, int64_t row, int64_t e, const Head& k) {
  const int64_t dim = a.dim, sharing = a.state_heads / a.kv_heads, j = e / sharing;
  load_head(a, row, projections(a, row) + (a.heads + j) * dim, a.k_norm, k);
  if (e % sharing == 0) {
    for (int64_t i = 0; i < dim; ++i) a.k[(row * a.kv_heads + j) * dim + i] = k.rotated[i];
  }
  hedgehog(a.rotated_features ? k.rotated : k.plain, a.k_map + e * dim * (a.features / 2),
           a.k_gain ? a.k_gain + e * (dim + 1) : nullptr, dim, a.features,
           a.kf + (row * a.state_heads + e) * a.features);
}

void read_window(const AttentionArgs& a, int64_t begin, int64_t end) noexcept {
  const int64_t tasks = a.heads + a.state_heads;
  Scratch scratch(4 * Scratch::take_bytes<float>(a.dim) + Scratch::take_bytes<float>(a.window));
  const Head q{scratch.take<float>(a.dim), scratch.take<float>(a.dim)};
  const Head k{scratch.take<float>(a.dim), scratch.take<float>(a.dim)};
  float* scores = scratch.take<float>(a.window);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / tasks, i = task % tasks;
    i < a.heads ? query_task(a, row, i, q, k, scores) : key_task(a, row, i - a.heads, k);
  }
}

// What of state head e of a row leaves the window at this token: nothing in the first w tokens.
struct Leaving {
  const float *kf, *v;  // [features], [dim], or null
};

FW_INLINE Leaving leaving(const AttentionArgs& a, int64_t row, int64_t e) {
  const int64_t position = a.position[row], slot = position % a.window, j = e / (a.state_heads / a.kv_heads);
  if (position < a.window) return {nullptr, nullptr};
  return {a.kf_ring + ((row * a.state_heads + e) * a.window + slot) * a.features,
          a.v_ring + ((row * a.kv_heads + j) * a.window + slot) * a.dim};
}

// V vectors of columns of S, from column c: S <- decay S + kf v^T.
template <int V>
static void update_columns(const float* decay, const Leaving& left, int64_t features, int64_t dim, int64_t c,
                           float* S) {
  Vec<float> value[V];
  FW_UNROLL
  for (int i = 0; i < V; ++i) value[i] = left.v ? load(left.v + c + i * L) : zero<float>();
  for (int64_t f = 0; f < features; ++f) {
    const Vec<float> keep = set1(decay ? decay[f] : 1.0f), add = set1(left.kf ? left.kf[f] : 0.0f);
    float* row = S + f * dim + c;
    FW_UNROLL
    for (int i = 0; i < V; ++i) store(row + i * L, fma(keep, load(row + i * L), add * value[i]));
  }
}

// o <- (o + qf S) * inverse on the same columns.
template <int V>
static void read_columns(const float* qf, float inverse, int64_t features, int64_t dim, int64_t c, const float* S,
                         float* o) {
  Vec<float> sum[V];
  FW_UNROLL
  for (int i = 0; i < V; ++i) sum[i] = load(o + c + i * L);
  for (int64_t f = 0; f < features; ++f) {
    const Vec<float> x = set1(qf[f]);
    FW_UNROLL
    for (int i = 0; i < V; ++i) sum[i] = fma(x, load(S + f * dim + c + i * L), sum[i]);
  }
  FW_UNROLL
  for (int i = 0; i < V; ++i) store(o + c + i * L, sum[i] * inverse);
}

// qf z for the z that `remember` is going to write.
static float read_z(const float* decay, const float* kf, const float* qf, const float* z, int64_t features) {
  float sum = 0.0f;
  for (int64_t f = 0; f < features; ++f) sum += qf[f] * ((decay ? decay[f] : 1.0f) * z[f] + (kf ? kf[f] : 0.0f));
  return sum;
}

static void state_task(const AttentionArgs& a, int64_t row, int64_t e, int64_t begin, int64_t end) {
  constexpr int kBlock = int(kColumns) / L;
  const int64_t F = a.features, dim = a.dim, state = row * a.state_heads + e, sharing = a.heads / a.state_heads;
  const float* decay = a.decay ? a.decay + e * F : nullptr;
  const Leaving left = leaving(a, row, e);
  float* S = a.S + state * F * dim;
  int64_t whole = begin;
  if (begin + kColumns <= end) {
    update_columns<kBlock>(decay, left, F, dim, begin, S);
    whole = end;
  }
  for (; whole + L <= end; whole += L) update_columns<1>(decay, left, F, dim, whole, S);
  for (int64_t f = 0; f < F && whole < end; ++f) {
    for (int64_t c = whole; c < end; ++c) {
      S[f * dim + c] = (decay ? decay[f] : 1.0f) * S[f * dim + c] + (left.kf ? left.kf[f] * left.v[c] : 0.0f);
    }
  }
  for (int64_t h = e * sharing; h < (e + 1) * sharing; ++h) {
    const int64_t head = row * a.heads + h;
    const float* qf = a.qf + head * F;
    float* o = a.o + head * dim;
    const float inverse = 1.0f / (a.normaliser[head] + read_z(decay, left.kf, qf, a.z + state * F, F));
    int64_t c = begin;
    if (begin + kColumns <= end) {
      read_columns<kBlock>(qf, inverse, F, dim, begin, S, o);
      c = end;
    }
    for (; c + L <= end; c += L) read_columns<1>(qf, inverse, F, dim, c, S, o);
    for (; c < end; ++c) {
      for (int64_t f = 0; f < F; ++f) o[c] += qf[f] * S[f * dim + c];
      o[c] *= inverse;
    }
  }
}

void read_state(const AttentionArgs& a, int64_t begin, int64_t end) noexcept {
  const int64_t blocks = (a.dim + kColumns - 1) / kColumns;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % blocks * kColumns, state = task / blocks;
    const int64_t last = first + kColumns < a.dim ? first + kColumns : a.dim;
    state_task(a, state / a.state_heads, state % a.state_heads, first, last);
  }
}

void remember(const AttentionArgs& a, int64_t begin, int64_t end) noexcept {
  const int64_t F = a.features, dim = a.dim;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t slot = a.position[row] % a.window;
    for (int64_t e = 0; e < a.state_heads; ++e) {
      const int64_t state = row * a.state_heads + e;
      const float* decay = a.decay ? a.decay + e * F : nullptr;
      const Leaving left = leaving(a, row, e);
      float *z = a.z + state * F, *kf = a.kf_ring + (state * a.window + slot) * F;
      for (int64_t f = 0; f < F; ++f) z[f] = (decay ? decay[f] : 1.0f) * z[f] + (left.kf ? left.kf[f] : 0.0f);
      for (int64_t f = 0; f < F; ++f) kf[f] = a.kf[state * F + f];
    }
    const float* value = projections(a, row) + (a.heads + a.kv_heads) * dim;
    for (int64_t j = 0; j < a.kv_heads; ++j) {
      const int64_t at = ((row * a.kv_heads + j) * a.window + slot) * dim;
      for (int64_t i = 0; i < dim; ++i) a.k_ring[at + i] = a.k[(row * a.kv_heads + j) * dim + i];
      for (int64_t i = 0; i < dim; ++i) a.v_ring[at + i] = value[j * dim + i];
    }
  }
}

}  // namespace fastweights::decoding::FW_LEVEL
