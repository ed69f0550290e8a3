// What ops.cpp hands to the kernels. With e = -beta (erase * k) and u = beta (write * v), the two that a gate beta,
// erase or write multiplies,
//   S- = diag(exp g) S,  d = u + S-^T e,  S = S- + k d^T,  o = S^T q.
#pragma once

#include "core/recurrence.h"

namespace fastweights::delta_rule {

// How g follows from what the caller gives: as it is, -exp(A_log) softplus(g + dt_bias), or
// lower_bound sigmoid(exp(A_log) (g + dt_bias)).
enum class Decay : int { given, softplus, bounded };

struct Problem : Recurrence {
  Rows q, k, v;
  Rows beta, g;              // in the type of the arithmetic; beta null: 1
  Rows erase, write;         // null: 1
  const void *A_log, *bias;  // in the type of the arithmetic: [HV]; one or K for each head. Null: 0
  Gate gate;
  Decay decay;
  Form form;
  bool l2norm;
  double scale, lower_bound;
  double beta_range;  // beta is this times the sigmoid of what is given; 0: as given
  States initial;     // S null: zeros
};

struct ForwardArgs {
  Problem p;
  Rows o;
  States final;  // S null: not wanted
  // Null, or the state before every kSegment tokens, [slots, HV, K, V]: sequence n, whose first token is number t0 of
  // all tokens, has its own from slot t0 / kSegment + n on.
  void* states;
  Rows corrections;  // d of every token, in the type of the arithmetic; null: not wanted
  bool only_states;  // o is not wanted
};

// dq, dk, dbeta, dg and derase have a head per tile and value head: tile * HV + h; the last three are in the type of
// the arithmetic. With a gate per head dg has one row per sequence: its sum over the tokens. dA_log and dbias are those
// sums for each task, [tasks] and [tasks, 1 or K].
struct BackwardArgs {
  Problem p;
  Rows grad_o;
  States grad_final, grad_initial;
  const void* states;
  Rows corrections;
  Rows dq, dk, dv, dbeta, dg, derase, dwrite;
  void *dA_log, *dbias;
};

// One token in place: p.T is 1, sequences are the batch, p.initial is the state.
struct StepArgs {
  Problem p;
  Rows o;
};

FW_DECLARE_KERNEL(forward, ForwardArgs)
FW_DECLARE_KERNEL(backward, BackwardArgs)
FW_DECLARE_KERNEL(step, StepArgs)

}  // namespace fastweights::delta_rule
