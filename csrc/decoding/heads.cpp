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

static void rms_norm(float* x, const float* weight, float eps, int64_t n) {
  const float factor = 1.0f / __builtin_sqrtf(dot(x, x, n) / float(n) + eps);
  for (int64_t i = 0; i < n; ++i) x[i] *= factor * weight[i];
}

// The halves of the vector are the real and imaginary parts of dim / 2 numbers, each turned by its angle.
static void rotate(const float* x, const float* cos, const float* sin, int64_t dim, float* y) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * cos[i] - x[i + half] * sin[i];
    y[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
}

// y[0 : V * L] = x W[:, 0 : V * L], W of `columns` columns.
template <int V>
static void product(const float* x, const float* W, int64_t dim, int64_t columns, float* y) {
  Vec<float> sum[V] = {};
  for (int64_t k = 0; k < dim; ++k) {
    const Vec<float> xk = set1(x[k]);
    FW_UNROLL
    for (int i = 0; i < V; ++i) sum[i] = fma(xk, load(W + k * columns + i * L), sum[i]);
  }
  FW_UNROLL
  for (int i = 0; i < V; ++i) store(y + i * L, sum[i]);
}

// out[i] = exp(sign * y[i]) over their sum.
static void softmax(const float* y, float sign, int64_t n, float* out) {
  float most = sign * y[0];
  for (int64_t i = 1; i < n; ++i) most = sign * y[i] > most ? sign * y[i] : most;
  Vec<float> total = zero<float>();
  for (int64_t i = 0; i < n; i += L) {
    const int64_t left = n - i < L ? n - i : L;
    store_as(out + i, exp(load_as(y + i, left) * sign - most), left);
    total += load_as(out + i, left);
  }
  const float inverse = 1.0f / reduce_add<float>(total);
  for (int64_t i = 0; i < n; ++i) out[i] *= inverse;
}

static void hedgehog(const float* x, const float* W, int64_t dim, int64_t features, float* y, float* out) {
  int64_t f = 0;
  for (; f + 8 * L <= features; f += 8 * L) product<8>(x, W + f, dim, features, y + f);
  for (; f + L <= features; f += L) product<1>(x, W + f, dim, features, y + f);
  for (; f < features; ++f) {
    float sum = 0.0f;
    for (int64_t k = 0; k < dim; ++k) sum = __builtin_fmaf(x[k], W[k * features + f], sum);
    y[f] = sum;
  }
  softmax(y, 1.0f, features, out);
  softmax(y, -1.0f, features, out + features);
}

void head_inputs(const HeadArgs& a, int64_t begin, int64_t end) noexcept {
  const int64_t tasks = a.heads + a.feature_heads, dim = a.dim, map_size = dim * a.features, outputs = 2 * a.features;
  const int64_t sharing = a.feature_heads / a.kv_heads;
  Scratch scratch(2 * Scratch::take_bytes<float>(dim) + Scratch::take_bytes<float>(a.features));
  float* x = scratch.take<float>(dim);
  float* turned = scratch.take<float>(dim);
  float* y = scratch.take<float>(a.features);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / tasks;
    const bool query = task % tasks < a.heads;
    const int64_t feature_head = query ? task % tasks : task % tasks - a.heads;
    const int64_t head = query ? feature_head : feature_head / sharing;
    const float* source = a.qkv + (row * (a.heads + 2 * a.kv_heads) + (query ? head : a.heads + head)) * dim;
    for (int64_t i = 0; i < dim; ++i) x[i] = source[i];
    const float* norm = query ? a.q_norm : a.k_norm;
    if (norm) rms_norm(x, norm, a.norm_eps, dim);
    rotate(x, a.cos + row * (dim / 2), a.sin + row * (dim / 2), dim, turned);

    if (query || feature_head % sharing == 0) {
      float* out = query ? a.q + (row * a.heads + head) * dim : a.k + (row * a.kv_heads + head) * dim;
      for (int64_t i = 0; i < dim; ++i) out[i] = turned[i];
    }
    if (query && a.sink_weight) {
      a.sink[row * a.heads + head] = dot(x, a.sink_weight + head * dim, dim) + a.sink_bias[head];
    }
    const float* map = (query ? a.q_map : a.k_map) + feature_head * map_size;
    float* out = query ? a.qf + (row * a.heads + head) * outputs : a.kf + (row * a.feature_heads + feature_head) * outputs;
    hedgehog(a.rotated_features ? turned : x, map, dim, a.features, y, out);
  }
}

}  // namespace fastweights::decoding::FW_LEVEL
