// What ops.cpp hands to the kernels: y = n weight act(gate) for each row of D numbers, n = x / sqrt(mean(x^2) + eps).
#pragma once

#include "core/levels.h"

namespace fastweights::norms {

// Rows of a task, and of one part of the gradient of weight.
constexpr int64_t kRows = 64;

enum class Gate : int { none, silu, sigmoid };

// [.., .., .., D] with contiguous rows, strides in elements.
struct RowSet {
  void* data = nullptr;
  int64_t strides[3] = {};
};

struct Problem {
  RowSet x, gate;
  const void* weight;  // [D] in the type of the arithmetic, or null
  Gate activation;
  Element element;
  double eps;
  int64_t sizes[3], rows, D;
};

// Task: kRows rows, here and in the backward.
struct ForwardArgs {
  Problem p;
  RowSet y;
};

struct BackwardArgs {
  Problem p;
  RowSet dy, dx, dgate;
  void* partial;  // [tasks, D]: gradients of weight in the type of the arithmetic; null: not wanted
};

FW_DECLARE_KERNEL(forward, ForwardArgs)
FW_DECLARE_KERNEL(backward, BackwardArgs)

}  // namespace fastweights::norms
