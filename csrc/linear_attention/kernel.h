// What ops.cpp hands to the kernels. S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; with the normaliser
// v has one more column, of ones, so that its state is z and its output the denominator.
#pragma once

#include "core/levels.h"

namespace fastweights::linear_attention {

// Tokens between two states that the forward keeps for the backward.
constexpr int64_t kSegment = 64;

enum class Gate : int { none, head, token, channel };
enum class Form : int { recurrent, chunked };

// [B, T, heads, n] with contiguous rows; strides in elements.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, time = 0, head = 0;
  Element element = Element::f32;
};

// One state per sequence and head, in the type of the arithmetic: S [N, HV, K, V] by strides, z [N, HV, K] contiguous.
struct States {
  void* S = nullptr;
  int64_t sequence = 0, head = 0, key = 0, value = 0;
  void* z = nullptr;
};

struct Problem {
  Rows q, k, v, g;  // g is in the type of the arithmetic
  Gate gate;
  Form form;
  bool normalize, reverse;
  double scale, eps;
  int64_t sequences, T, H, HV, K, V;
  const int64_t* starts;      // [sequences + 1] among all tokens; null: each sequence is a batch entry of T tokens
  States initial;             // S, z null: zeros
  int64_t tiles, tile_width;  // V in tiles of tile_width columns, the last one may be narrower
  int64_t cache;              // bytes of a core's second-level cache
};

// Task (n * tiles + tile) * HV + h.
struct ForwardArgs {
  Problem p;
  Rows o;
  States final;  // null: not wanted
  // Null, or the state before every kSegment tokens, [slots, HV, K, V + normalize]: sequence n, whose first token is
  // number t0 of all tokens, has its own from slot t0 / kSegment + n on.
  void* states;
  bool only_states;
};

// Task (n * tiles + tile) * HV + h. dq, dk, dg have a head per tile and value head: tile * HV + h. With a gate per head
// dg has one row per sequence: its sum over the tokens.
struct BackwardArgs {
  Problem p;
  Rows o, grad_o;  // o only with the normaliser
  States grad_final, grad_initial;
  const void* states;
  Rows dq, dk, dv, dg;
};

// out[b, t, h] = sum over tiles and over the value heads of h; task b * T + t.
struct ReduceArgs {
  Rows in, out;
  int64_t T, H, HV, K, tiles;
};

// One token in place: q, k [B, H, K], v, o [B, HV, V] and g are Rows without time; task b * HV + h.
struct StepArgs {
  Rows q, k, v, g, o;
  Gate gate;
  bool normalize;
  double scale, eps;
  int64_t H, HV, K, V;
  States state;
};

FW_DECLARE_KERNEL(forward, ForwardArgs)
FW_DECLARE_KERNEL(backward, BackwardArgs)
FW_DECLARE_KERNEL(reduce, ReduceArgs)
FW_DECLARE_KERNEL(step, StepArgs)

}  // namespace fastweights::linear_attention
