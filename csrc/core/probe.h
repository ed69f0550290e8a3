// Measurements of the machine and entry points for accuracy tests, per CPU level: what `fastweights bench` holds a
// kernel against. Each runs on the calling thread.
#pragma once

#include <stdint.h>

#include "core/levels.h"

namespace fastweights::probe {

// out[i] = f(x[i])
enum class Function : int { exp, log, sigmoid, softplus, tanh };
struct MathArgs {
  Function function;
  Element element;  // f32 or f64
  const void* x;
  void* out;
  int64_t n;
};

// to_float: float32 from 16 bits; otherwise 16 bits from float32.
struct ConvertArgs {
  Element element;  // bf16 or f16
  bool to_float;
  const void* x;
  void* out;
  int64_t n;
};

// The peak of multiply-adds (float, or pairs of bfloat16) whose operands stay in registers.
struct PeakArgs {
  bool bf16;
  int64_t rounds;
  double* flops;  // out: operations done
  float* sink;    // out
};

// One product of the register tile, repeated. float: C[M, N] = A[M, K] B[K, N]; bf16: A and B as pairs in 32 bits.
struct GemmArgs {
  bool bf16;
  int64_t M, N, K, repeats;
  const void* A;
  const void* B;
  float* C;
};

// One pass over n floats: read (sum into out), copy, or update in place (x = a * x + x, the pattern of a decode step).
enum class Stream : int { read, copy, update };
struct StreamArgs {
  Stream kind;
  float* x;
  float* y;
  int64_t n;
  float* sink;  // out
};

// Visible outside the library: the Python module calls them.
#pragma GCC visibility push(default)
FW_DECLARE_KERNEL(math, MathArgs)
FW_DECLARE_KERNEL(convert, ConvertArgs)
FW_DECLARE_KERNEL(peak, PeakArgs)
FW_DECLARE_KERNEL(gemm_tile, GemmArgs)
FW_DECLARE_KERNEL(stream, StreamArgs)
#pragma GCC visibility pop

}  // namespace fastweights::probe
