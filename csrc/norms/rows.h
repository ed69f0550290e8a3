// The rows of a task, and its gate.
#pragma once

#include "core/tail.h"
#include "core/vmath.h"
#include "norms/kernel.h"

namespace fastweights::norms::FW_LEVEL {
using namespace ::fastweights::FW_LEVEL;

// f(index in three dimensions) for the rows of the tasks [begin, end), in order; before the first of a task,
// first(task).
template <typename First, typename F>
FW_INLINE void for_rows(const Problem& p, int64_t begin, int64_t end, const First& first, const F& f) {
  const int64_t last = end * kRows < p.rows ? end * kRows : p.rows;
  for (int64_t row = begin * kRows; row < last; ++row) {
    if (row % kRows == 0) first(row / kRows);
    const int64_t outer = row / p.sizes[2];
    const int64_t index[3] = {outer / p.sizes[1], outer % p.sizes[1], row % p.sizes[2]};
    f(index);
  }
}

template <typename S>
FW_INLINE S* row_at(const RowSet& r, const int64_t* index) {
  return static_cast<S*>(r.data) + index[0] * r.strides[0] + index[1] * r.strides[1] + index[2] * r.strides[2];
}

template <Gate kGate, typename V>
FW_INLINE V activated(V gate) {
  return kGate == Gate::silu ? silu(gate) : sigmoid(gate);
}

}  // namespace fastweights::norms::FW_LEVEL
