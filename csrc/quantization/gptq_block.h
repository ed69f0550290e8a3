// What ops_gptq_block.cpp hands to gptq_block.cpp.
#pragma once

#include "core/levels.h"

namespace fastweights::quantization {

// Rows of a task: one vector of float at the widest level.
constexpr int64_t kRoundRows = 16;

// Rows of w, one task each kRoundRows. All matrices are of the same element type, float or double, with contiguous
// rows.
struct GptqBlockArgs {
  Element element;
  int64_t N, C;
  const void *w, *scale, *minimum;  // [N, C]
  int64_t w_stride, scale_stride, minimum_stride;
  const void *u, *p;  // [C, C], read above the diagonal, u on it too; p may be null
  int64_t u_stride, p_stride;
  double least, most;
  void *codes, *errors;  // out [N, C], rows C apart
};
FW_DECLARE_KERNEL(gptq_block, GptqBlockArgs)

}  // namespace fastweights::quantization
