// What ops.cpp hands to the kernels. S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; with the normaliser
// v has one more column, of ones, so that its state is z and its output the denominator.
#pragma once

#include "core/recurrence.h"

namespace fastweights::linear_attention {

struct Problem : Recurrence {
  Rows q, k, v, g;  // g is in the type of the arithmetic
  Gate gate;
  Form form;
  double scale, eps;
  States initial;  // S, z null: zeros
};

struct ForwardArgs {
  Problem p;
  Rows o;
  States final;  // null: not wanted
  // Null, or the state before every kSegment tokens, [slots, HV, K, V + normalize]: sequence n, whose first token is
  // number t0 of all tokens, has its own from slot t0 / kSegment + n on.
  void* states;
  bool only_states;
};

// dq, dk, dg have a head per tile and value head: tile * HV + h. With a gate per head
// dg has one row per sequence: its sum over the tokens.
struct BackwardArgs {
  Problem p;
  Rows o, grad_o;  // o only with the normaliser
  States grad_final, grad_initial;
  const void* states;
  Rows dq, dk, dv, dg;
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
FW_DECLARE_KERNEL(step, StepArgs)

}  // namespace fastweights::linear_attention
