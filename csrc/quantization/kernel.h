// What the torch side of the quantization family and its kernels agree on: the packed weight and the arguments.
//
// A weight W [N, K] is stored as strips of 16 outputs. A strip is one sequential stream of bundles along K. A bundle
// holds the codes of its groups of `group` inputs each, one group after another, and then their parameters. A group is
// a bundle where its parameters fill a line of 64 bytes; else a bundle has as many groups as it takes.
//   codes       planes of 8, 4, 2 or 1 bit: 3 bits are a plane of 2 and, above it, one of 1; 5 are 4 and 1; 6 are 4
//               and 2. A line of a plane is 16 outputs x 4 bytes: byte (r, t) has the bits of W[r, 4q + t] for as many
//               quartets q of inputs as it holds, the first one lowest. Where there are two planes they alternate:
//               lines of the lower one, then a line of the upper one for the same inputs.
//   parameters  rows of 16, one number per output: see Parameter in formats.h.
// W[n, k] = scale * (level(code) + offset) + minimum. Every line is 64-byte aligned relative to the strip, one vector
// of any CPU level holds whole outputs, and lanes are outputs: no horizontal sums. Outputs beyond N have scale =
// minimum = 0; inputs beyond K have code 0 and meet activations that are 0; groups that only fill the last bundle are
// not read.
#pragma once

#include "core/levels.h"
#include "quantization/formats.h"

namespace fastweights::quantization {

constexpr int64_t kIntRows = 4;      // rows per panel of int8 activations
constexpr int64_t kFloatRows = 6;    // rows per panel of float activations
constexpr int64_t kSourceRows = 12;  // rows of x per pack_activations task: whole panels of both kinds
constexpr int64_t kRowBlock = 60;    // rows of x per matmul task: whole panels of both kinds

struct Weight {
  Format format;
  Parameter parameter;
  int64_t N, K, group;
  int64_t strips, groups;                          // ceil(N / 16), ceil(K / group)
  int64_t group_bytes, bundle_bytes, strip_bytes;  // of a group's codes, of a bundle, of a strip
  const uint8_t* packed;
};

// Task = strip: fits scales and minima of 16 outputs and packs their codes.
struct QuantizeArgs {
  Weight weight;  // its shape; `packed` is not read
  Element element;
  const void* w;  // [N, K], rows w_stride elements apart
  int64_t w_stride;
  uint8_t* packed;  // out
};
FW_DECLARE_KERNEL(quantize, QuantizeArgs)

// Task = 16 rows of out. Row i of out is row index[i] of the weight, or row i where index is null.
struct DequantizeArgs {
  Weight weight;
  const int64_t* index;
  int64_t rows;
  Element element;
  void* out;  // [rows, K]
};
FW_DECLARE_KERNEL(dequantize, DequantizeArgs)

// What happens to a row of x before it meets the weight.
struct Prologue {
  const float* norm_weight;  // [K] or null: x <- x * norm_weight / sqrt(mean(x^2) + norm_eps)
  float norm_eps;
  bool gated;  // x holds 2K elements: x <- silu(x[:K]) * x[K:]
};

// Activations as the matmul kernels read them, padded with zeros to whole groups. Rows come in blocks of kRowBlock, a
// block in groups along K, a group in panels of R = kIntRows (kFloatRows) rows, the last block and panel holding what
// is left: what a strip's group meets lies together. Within a panel
//   codes   int8  [group / 4][R][4]    codes * scales = x
//   values  T     [4][group / 4][R]    x[g * group + 4j + t] at [t][j]
//   scales  float [blocks][R], code_sums int32 [blocks][R]: per block of 32 (or a smaller group), the scale and the sum
//           of the codes
//   sums    T     [R]                  sum of the (quantized) x over the group
struct Activations {
  bool quantized;  // codes and scales, else values
  int8_t* codes;
  float* scales;
  int32_t* code_sums;
  void* values;  // float, or double for Element::f64
  void* sums;    // float, or double for values in double
};

// Task = kSourceRows rows of x.
struct ActivationArgs {
  Element element;
  const void* x;  // [M, K] (or [M, 2K]), rows x_stride elements apart
  int64_t x_stride, M, K, group, groups;
  Prologue prologue;
  Activations out;
};
FW_DECLARE_KERNEL(pack_activations, ActivationArgs)

// y = x W^T + bias + residual. Task t = (row block t / strips, strip t % strips).
struct MatmulArgs {
  Weight weight;
  Activations x;
  int64_t M;
  Element bias_element, element;  // element: of residual and y
  const void* bias;               // [N] or null
  const void* residual;           // [M, N], rows residual_stride apart, or null
  int64_t residual_stride;
  void* y;  // out [M, N], rows y_stride apart
  int64_t y_stride;
};
FW_DECLARE_KERNEL(matmul_int8, MatmulArgs)
FW_DECLARE_KERNEL(matmul_float, MatmulArgs)

// The same for bfloat16 through the tile registers of AMX, at the level avx512_bf16 where the machine has them.
// pack_tiles: task = 16 rows of x, to tiles [ceil(K / 32)][16 rows][32] of bfloat16 at out.values, without a prologue.
// matmul_tiles: task t = (row block t / pairs, pair of strips t % pairs).
constexpr int64_t kTileRows = 256;
FW_DECLARE_KERNEL(pack_tiles, ActivationArgs)
FW_DECLARE_KERNEL(matmul_tiles, MatmulArgs)

constexpr int64_t kBackwardRows = 256;    // rows of dy per task
constexpr int64_t kBackwardInputs = 128;  // columns of dx per task
constexpr int64_t kBackwardOutputs = 64;  // outputs whose gradients a task transposes

// dx = dy W, in two passes. transpose_dy: task t = (row block t / panels, panel of outputs t % panels). backward: task
// t = (row block t / chunks, chunk of inputs t % chunks).
struct BackwardArgs {
  Weight weight;
  Element element;  // of dy and dx
  const void* dy;   // [M, N], rows dy_stride apart
  int64_t dy_stride, M;
  void* transposed;  // a block of rows after another, each [16 strips][rows, up to whole vectors], float or double
  int64_t panels;
  void* dx;  // out [M, K]
  int64_t chunks;
};
FW_DECLARE_KERNEL(transpose_dy, BackwardArgs)
FW_DECLARE_KERNEL(backward, BackwardArgs)

// The same for bfloat16 through the tile registers; blocks of `transposed` are tiles [outputs / 32][rows / 16].
FW_DECLARE_KERNEL(transpose_dy_tiles, BackwardArgs)
FW_DECLARE_KERNEL(backward_tiles, BackwardArgs)

}  // namespace fastweights::quantization
