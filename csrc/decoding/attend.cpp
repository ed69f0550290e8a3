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

// The halves of x are the real and imaginary parts of dim / 2 numbers, each turned by its angle.
static void rotate(const float* x, const float* cos, const float* sin, int64_t dim, float* y) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * cos[i] - x[i + half] * sin[i];
    y[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
}

// Calls body(offset, integral V) over n columns: V vectors at a time while they last, then one, then single columns
// with V = 0.
template <typename Wide, typename Single>
FW_INLINE void for_columns(int64_t n, const Wide& wide, const Single& single) {
  int64_t i = 0;
  for (; i + 8 * L <= n; i += 8 * L) wide.template operator()<8>(i);
  for (; i + L <= n; i += L) wide.template operator()<1>(i);
  for (; i < n; ++i) single(i);
}

// y = x W, W [dim, columns].
static void product(const float* x, const float* W, int64_t dim, int64_t columns, float* y) {
  for_columns(
      columns,
      [&]<int V>(int64_t c) {
        Vec<float> sum[V] = {};
        for (int64_t k = 0; k < dim; ++k) {
          const Vec<float> xk = set1(x[k]);
          FW_UNROLL
          for (int i = 0; i < V; ++i) sum[i] = fma(xk, load(W + k * columns + c + i * L), sum[i]);
        }
        FW_UNROLL
        for (int i = 0; i < V; ++i) store(y + c + i * L, sum[i]);
      },
      [&](int64_t c) {
        float sum = 0.0f;
        for (int64_t k = 0; k < dim; ++k) sum = __builtin_fmaf(x[k], W[k * columns + c], sum);
        y[c] = sum;
      });
}

// out = exp(sign * y) over its sum.
static void softmax(const float* y, float sign, int64_t n, float* out) {
  float most = sign * y[0];
  for (int64_t i = 1; i < n; ++i) most = sign * y[i] > most ? sign * y[i] : most;
  float total = 0.0f;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t left = n - i < L ? n - i : L;
    store_as(out + i, exp(load_as(y + i, left) * sign - most), left);
  }
  for (int64_t i = 0; i < n; ++i) total += out[i];
  for (int64_t i = 0; i < n; ++i) out[i] /= total;
}

static void hedgehog(const float* x, const float* W, int64_t dim, int64_t features, float* y, float* out) {
  const int64_t columns = features / 2;
  product(x, W, dim, columns, y);
  softmax(y, 1.0f, columns, out);
  softmax(y, -1.0f, columns, out + columns);
}

// S <- decay S + kf v^T and o = qf S in one sweep; kf and v, or decay, may be null.
static void update_and_read(const float* decay, const float* kf, const float* v, const float* qf, int64_t features,
                            int64_t dim, float* S, float* o) {
  for_columns(
      dim,
      [&]<int V>(int64_t c) {
        Vec<float> value[V], sum[V] = {};
        FW_UNROLL
        for (int i = 0; i < V; ++i) value[i] = v ? load(v + c + i * L) : zero<float>();
        for (int64_t f = 0; f < features; ++f) {
          const Vec<float> a = set1(decay ? decay[f] : 1.0f), b = set1(kf ? kf[f] : 0.0f), r = set1(qf[f]);
          float* row = S + f * dim + c;
          FW_UNROLL
          for (int i = 0; i < V; ++i) {
            const Vec<float> s = fma(a, load(row + i * L), b * value[i]);
            store(row + i * L, s);
            sum[i] = fma(r, s, sum[i]);
          }
        }
        FW_UNROLL
        for (int i = 0; i < V; ++i) store(o + c + i * L, sum[i]);
      },
      [&](int64_t c) {
        float sum = 0.0f;
        for (int64_t f = 0; f < features; ++f) {
          float& s = S[f * dim + c];
          s = (decay ? decay[f] : 1.0f) * s + (kf ? kf[f] * v[c] : 0.0f);
          sum += qf[f] * s;
        }
        o[c] = sum;
      });
}

// Memory of one task: vectors of `dim`, of `features`, and the window's scores.
struct Buffers {
  float *q, *k, *turned_q, *turned_k, *qf, *kf, *y, *scores;
  static size_t bytes(const AttendArgs& a) {
    return 4 * Scratch::take_bytes<float>(a.dim) + 3 * Scratch::take_bytes<float>(a.features) +
           Scratch::take_bytes<float>(a.window + 1);
  }
  Buffers(Scratch& s, const AttendArgs& a)
      : q(s.take<float>(a.dim)),
        k(s.take<float>(a.dim)),
        turned_q(s.take<float>(a.dim)),
        turned_k(s.take<float>(a.dim)),
        qf(s.take<float>(a.features)),
        kf(s.take<float>(a.features)),
        y(s.take<float>(a.features)),
        scores(s.take<float>(a.window + 1)) {}
};

// The window's part: adds to o [dim], returns its share of the normaliser.
static float window_softmax(const AttendArgs& a, const float* q, const float* k, const float* v, const float* k_ring,
                            const float* v_ring, int64_t position, float mix, const float* sink, float* scores,
                            float* o) {
  const int64_t dim = a.dim, slot = position % a.window;
  const int64_t count = position + 1 < a.window ? position + 1 : a.window;
  for (int64_t i = 0; i < count; ++i) scores[i] = a.scale * dot(q, i == slot ? k : k_ring + i * dim, dim);
  float m = sink ? *sink : scores[0];
  for (int64_t i = 0; i < count; ++i) m = scores[i] > m ? scores[i] : m;
  float total = sink ? exp(*sink - m) : 0.0f;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t left = count - i < L ? count - i : L;
    store_as(scores + i, exp(load_as(scores + i, left) - m), left);
  }
  for (int64_t i = 0; i < count; ++i) {
    total += scores[i];
    const float weight = mix * scores[i];
    const float* value = i == slot ? v : v_ring + i * dim;
    for (int64_t c = 0; c < dim; ++c) o[c] += weight * value[c];
  }
  return mix * total;
}

static void attend_head(const AttendArgs& a, int64_t row, int64_t h, const Buffers& t) {
  const int64_t dim = a.dim, F = a.features, w = a.window, group = a.heads / a.kv_heads, j = h / group;
  const float* source = a.qkv + row * (a.heads + 2 * a.kv_heads) * dim;
  const float *cos = a.cos + row * (dim / 2), *sin = a.sin + row * (dim / 2);
  const float* v = source + (a.heads + a.kv_heads + j) * dim;
  for (int64_t i = 0; i < dim; ++i) t.q[i] = source[h * dim + i];
  for (int64_t i = 0; i < dim; ++i) t.k[i] = source[(a.heads + j) * dim + i];
  if (a.q_norm) rms_norm(t.q, a.q_norm, a.norm_eps, dim);
  if (a.k_norm) rms_norm(t.k, a.k_norm, a.norm_eps, dim);
  rotate(t.q, cos, sin, dim, t.turned_q);
  rotate(t.k, cos, sin, dim, t.turned_k);
  if (h % group == 0) {
    for (int64_t i = 0; i < dim; ++i) a.k[(row * a.kv_heads + j) * dim + i] = t.turned_k[i];
  }
  const int64_t map = h * dim * (F / 2);
  hedgehog(a.rotated_features ? t.turned_q : t.q, a.q_map + map, dim, F, t.y, t.qf);
  hedgehog(a.rotated_features ? t.turned_k : t.k, a.k_map + map, dim, F, t.y, t.kf);

  const int64_t head = row * a.heads + h, ring = (row * a.kv_heads + j) * w * dim;
  const int64_t position = a.position[row], slot = position % w;
  float *S = a.S + head * F * dim, *z = a.z + head * F, *kf_slot = a.kf_ring + (head * w + slot) * F;
  float* o = a.o + head * dim;
  const float* decay = a.decay ? a.decay + h * F : nullptr;
  const float* left = position >= w ? kf_slot : nullptr;  // features of the key that leaves the window now
  const float* left_value = position >= w ? a.v_ring + ring + slot * dim : nullptr;
  update_and_read(decay, left, left_value, t.qf, F, dim, S, o);
  for (int64_t f = 0; f < F; ++f) z[f] = (decay ? decay[f] : 1.0f) * z[f] + (left ? left[f] : 0.0f);
  for (int64_t f = 0; f < F; ++f) kf_slot[f] = t.kf[f];

  float sink = 0.0f;
  if (a.sink_weight) sink = dot(t.q, a.sink_weight + h * dim, dim) + a.sink_bias[h];
  const float normaliser =
      dot(t.qf, z, F) + window_softmax(a, t.turned_q, t.turned_k, v, a.k_ring + ring, a.v_ring + ring, position,
                                       a.mix[h], a.sink_weight ? &sink : nullptr, t.scores, o);
  for (int64_t c = 0; c < dim; ++c) o[c] /= normaliser;
}

void attend(const AttendArgs& a, int64_t begin, int64_t end) noexcept {
  Scratch scratch(Buffers::bytes(a));
  const Buffers buffers(scratch, a);
  for (int64_t task = begin; task < end; ++task) attend_head(a, task / a.heads, task % a.heads, buffers);
}

void remember(const AttendArgs& a, int64_t begin, int64_t end) noexcept {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t slot = a.position[row] % a.window;
    for (int64_t j = 0; j < a.kv_heads; ++j) {
      const int64_t at = ((row * a.kv_heads + j) * a.window + slot) * a.dim;
      const float* k = a.k + (row * a.kv_heads + j) * a.dim;
      const float* v = a.qkv + (row * (a.heads + 2 * a.kv_heads) + a.heads + a.kv_heads + j) * a.dim;
      for (int64_t i = 0; i < a.dim; ++i) a.k_ring[at + i] = k[i];
      for (int64_t i = 0; i < a.dim; ++i) a.v_ring[at + i] = v[i];
    }
  }
}

}  // namespace fastweights::decoding::FW_LEVEL
