// What the torch side of the decoding family and its kernels agree on. Everything is float32.
#pragma once

#include "core/levels.h"

namespace fastweights::decoding {

// From the projections of one token per row to what the attention step reads. Task = one head's features: row *
// (heads + feature_heads) + head, the query heads first.
//   q_h <- norm(q_h),  k_h <- norm(k_h)                     where q_norm, k_norm are given (Qwen3)
//   sink_h = sink_weight_h . q_h + sink_bias_h
//   qf_h = [softmax(q_h Wq_h), softmax(-q_h Wq_h)], kf alike (Hedgehog), of the rotated vectors if rotated_features
//   q_h, k_h <- rotated by the row's angles
struct HeadArgs {
  int64_t heads, kv_heads, dim, features;  // features: columns of W, half of the map's outputs
  int64_t feature_heads;                   // heads of kf, a multiple of kv_heads; consecutive ones share a key head
  bool rotated_features;
  const float* qkv;                        // [B, (heads + 2 kv_heads) * dim]
  const float *cos, *sin;                  // [B, dim / 2]
  const float *q_norm, *k_norm;            // [dim] or null
  float norm_eps;
  const float *q_map, *k_map;              // [heads, dim, features], [feature_heads, dim, features]
  const float *sink_weight, *sink_bias;    // [heads, dim], [heads], or null
  float *q, *k;                            // out [B, heads, dim], [B, kv_heads, dim]
  float *qf, *kf;                          // out [B, heads, 2 features], [B, feature_heads, 2 features]
  float* sink;                             // out [B, heads]
};
FW_DECLARE_KERNEL(head_inputs, HeadArgs)

}  // namespace fastweights::decoding
