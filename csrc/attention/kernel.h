// The kernels of window and hybrid attention: window attention is hybrid attention without features (F = 0).
#pragma once

#include <stdint.h>

#include "core/levels.h"

namespace fastweights::attention {

// Which keys query i sees. sliding: i - window < j <= i. symmetric: |i - j| < window. terraced: the block of i up to i,
// and the block before it.
enum class Layout : int { sliding, symmetric, terraced };

// [B, T, H, D] with contiguous D; strides in elements.
struct Rows {
  const void* data;
  int64_t batch, token, head;
};

// What forward and backward read. "Compute" is float, double where element is f64.
struct Inputs {
  Element element;
  Layout layout;
  int64_t sequences, HQ, HKV, HF, HG, HS, K, V, F;
  int64_t window, ring;
  bool packed;            // the sequences share one batch row
  int64_t length;         // tokens of a sequence that is not packed
  const int64_t* bounds;  // packed: [sequences + 1], first token of each
  double scale;
  Rows q, k, v, qf, kf;
  Rows g;            // compute [B, T, HG], or [HG, F] if per_channel; null data: no decay
  bool per_channel;  // the decay is one of each feature, the same at every token
  Rows sink;         // compute [B, T, HQ]; null data: none
  const void* mix;   // compute [HQ]; null: 1
  // The past, all compute and contiguous; null position: none.
  const int64_t* position;  // [sequences]
  const void *k_ring, *v_ring, *kf_ring, *S0,
      *z0;  // [sequences, H, ring, D]; [sequences, HS, F, V]; [sequences, HS, F]
};

// A task is one segment of one query head of one sequence; with features a head is one segment.
struct ForwardArgs {
  Inputs in;
  int64_t segments = 1, segment_length = 0;
  void* o = nullptr;                // element [B, T, HQ, V]
  void* lse = nullptr;              // compute [B, T, HQ], or null
  void *S = nullptr, *z = nullptr;  // the states at the end, laid out like S0 and z0, or null
};

// A task is one query head of one sequence. Gradients of what several query heads share are written per query head,
// rows padded to whole vectors, for `reduce` to sum.
struct BackwardArgs {
  Inputs in;
  Rows dO{};                                          // element
  const void* dlse = nullptr;                         // compute [B, T, HQ], or null
  const void *dS = nullptr, *dz = nullptr;            // gradients of the states at the end, or null
  void *dq = nullptr, *dqf = nullptr;                 // element [B, T, HQ, ·]
  void *dk = nullptr, *dv = nullptr, *dkf = nullptr;  // compute [HQ, rows, padded D], zero on entry
  int64_t rows = 0, K_pad = 0, V_pad = 0, F_pad = 0;  // rows: those of the past included
  void* dg = nullptr;                   // compute [B, T, HQ], or [sequences, HQ, F] of a decay per channel, or null
  void* dsink = nullptr;                // compute [B, T, HQ], or null
  void* dmix = nullptr;                 // compute [sequences, HQ], or null
  void *dS0 = nullptr, *dz0 = nullptr;  // compute [sequences, HQ, F, V] and [sequences, HQ, F], or null
};

// Sums `partial` [HQ, rows, D_pad] over the query heads of each of H heads, into tokens and past. A task is one head
// of one sequence.
struct ReduceArgs {
  Inputs in;
  int64_t rows, H, D, D_pad;
  const void* partial = nullptr;
  void* out = nullptr;   // element [B, T, H, D]
  void* past = nullptr;  // compute [sequences, H, ring, D], or null
};

// One token. step: a task is one state head of one row, and nothing but S, z and o is written. remember: a task is one
// row, whose token goes into the rings.
struct StepArgs {
  Element element = Element::f32;
  int64_t HQ = 0, HKV = 0, HF = 0, HG = 1, HS = 0, K = 0, V = 0, F = 0;
  int64_t window = 0, ring = 0;  // ring == window: sliding; 2 window: terraced
  double scale = 0;
  Rows q{}, k{}, v{}, qf{}, kf{};                                 // element [B, H, D]
  Rows g{};                                                       // compute [B, HG], null data: no decay
  bool per_channel = false;                                       // g is [HG, F] instead
  Rows sink{};                                                    // compute [B, HQ], null data: none
  const void* mix = nullptr;                                      // compute [HQ]
  void *k_ring = nullptr, *v_ring = nullptr, *kf_ring = nullptr;  // compute [B, H, ring, D]
  void *S = nullptr, *z = nullptr;                                // compute [B, HS, F, V], [B, HS, F]
  int64_t* position = nullptr;                                    // [B]
  void* o = nullptr;                                              // element [B, HQ, V]
};

FW_DECLARE_KERNEL(step, StepArgs)
FW_DECLARE_KERNEL(remember, StepArgs)
FW_DECLARE_KERNEL(forward, ForwardArgs)
FW_DECLARE_KERNEL(backward, BackwardArgs)
FW_DECLARE_KERNEL(reduce, ReduceArgs)

}  // namespace fastweights::attention
