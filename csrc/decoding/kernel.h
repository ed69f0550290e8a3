// What the torch side of the decoding family and its kernels agree on. Everything is float32.
#pragma once

#include "core/levels.h"

namespace fastweights::decoding {

// One token per row through one layer's hybrid attention, from the projections to the heads' outputs. With the row's
// position p, window w and slot s = p mod w, for query head h reading key head j = h / (heads / kv_heads):
//   q <- norm(q_h), k <- norm(k_j)                           where q_norm, k_norm are given (Qwen3)
//   sink = sink_weight_h . q + sink_bias_h                   or no sink
//   qf = [softmax(q Wq_h), softmax(-q Wq_h)], kf of k alike  (Hedgehog), after the rotation if rotated_features
//   q, k <- rotated by the row's angles
//   S, z <- decay S + kf_(p-w) v_(p-w)^T, decay z + kf_(p-w) for p >= w, without the products before
//   m = max(sink, max_i q . k_i * scale)                     over the window, i = p - w + 1 ... p
//   o = (mix sum_i exp(q . k_i * scale - m) v_i + qf S) / (mix (exp(sink - m) + sum_i exp(q . k_i * scale - m)) + qf z)
// Task = row * heads + h. A task writes S, z and slot s of the ring of kf, all its own; heads share the rings of k and v,
// which `remember` (task = row) writes afterwards.
struct AttendArgs {
  int64_t heads, kv_heads, dim, features, window;  // features: of a head, twice the columns of W
  bool rotated_features;
  float scale, norm_eps;
  const float* qkv;                                // [B, (heads + 2 kv_heads) * dim]
  const float *cos, *sin;                          // [B, dim / 2]
  const int64_t* position;                         // [B]
  const float *q_norm, *k_norm;                    // [dim] or null
  const float *q_map, *k_map;                      // [heads, dim, features / 2]
  const float *mix, *decay;                        // [heads]; [heads, features] or null
  const float *sink_weight, *sink_bias;            // [heads, dim] and [heads], or null
  float *k_ring, *v_ring, *kf_ring, *S, *z;        // [B, kv_heads, w, dim] twice, [B, heads, w, features], [B, heads, features, dim], [B, heads, features]
  float* k;                                        // out [B, kv_heads, dim], rotated
  float* o;                                        // out [B, heads, dim]
};
FW_DECLARE_KERNEL(attend, AttendArgs)
FW_DECLARE_KERNEL(remember, AttendArgs)

}  // namespace fastweights::decoding
