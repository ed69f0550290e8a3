// What the torch side of the decoding family and its kernels agree on. Everything is float32.
#pragma once

#include "core/levels.h"

namespace fastweights::decoding {

constexpr int64_t kColumns = 32;  // of a state that one task of `read_state` takes

// One token per row through one layer's hybrid attention, from the projections to the heads' outputs. With the row's
// position p, window w and slot s = p mod w, for query head h that reads key head j and state head e:
//   q <- norm(q_h), k <- norm(k_j)                       where q_norm, k_norm are given (Qwen3)
//   sink = (q, 1) . sink_h                               or no sink
//   qf = exp((q, 1) . q_gain_h) [softmax(q Wq_h), softmax(-q Wq_h)]
//   kf = exp((k, 1) . k_gain_e) [softmax(k Wk_e), softmax(-k Wk_e)]    (Hedgehog), both after the rotation if
//                                                        rotated_features; gains within e^-15 ... e^15, or none
//   q, k <- rotated by the row's angles
//   S_e, z_e <- decay_e S_e + kf_(p-w) v_(p-w)^T, decay_e z_e + kf_(p-w)     (p < w: without what has not left)
//   m = max(sink, max_i scale q . k_i)                   over the window, i = p - w + 1 ... p
//   o = (mix_h sum_i exp(scale q . k_i - m) v_i + qf S_e) / (mix_h (exp(sink - m) + sum_i exp(scale q . k_i - m)) + qf
//   z_e)
// in three phases. Nobody writes what another task of its phase reads.
struct AttentionArgs {
  int64_t heads, kv_heads, state_heads, dim, features, window;  // features: of a head, twice the columns of W
  bool rotated_features;
  float scale, norm_eps;
  const float* qkv;                          // [B, (heads + 2 kv_heads) * dim]
  const float *cos, *sin;                    // [B, dim / 2]
  const int64_t* position;                   // [B]
  const float *q_norm, *k_norm;              // [dim] or null
  const float *q_map, *k_map;                // W: [heads, dim, features / 2], [state_heads, dim, features / 2]
  const float *mix, *decay;                  // [heads]; [state_heads, features] or null
  const float *sink, *q_gain, *k_gain;       // [heads, dim + 1] twice and [state_heads, dim + 1], or null
  float *k_ring, *v_ring, *kf_ring, *S, *z;  // the state: [B, kv_heads, w, dim] twice, [B, state_heads, w, features],
                                             // [B, state_heads, features, dim], [B, state_heads, features]
  float *k, *qf, *kf;                        // from the first phase: [B, kv_heads, dim] rotated, [B, heads, features],
  float *o, *normaliser;                     // [B, state_heads, features], [B, heads, dim], [B, heads]
};

// Features, and the window's part of o and of the normaliser. Task = row * (heads + state_heads) + head, queries first.
FW_DECLARE_KERNEL(read_window, AttentionArgs)
// S goes one token on and o is finished. Task = (row * state_heads + state head) * blocks of kColumns columns + block.
FW_DECLARE_KERNEL(read_state, AttentionArgs)
// z goes one token on and the token enters the rings. Task = row.
FW_DECLARE_KERNEL(remember, AttentionArgs)

}  // namespace fastweights::decoding
