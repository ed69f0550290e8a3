// How the backward is cut into tasks.
#pragma once

#include "quantization/line.h"

namespace fastweights::quantization::FW_LEVEL {

// A block of rows of dy, of which there are `columns` when they are made up to a multiple.
struct Rows {
  int64_t first, count, columns;
};

FW_INLINE Rows rows_of(const BackwardArgs& a, int64_t multiple, int64_t block) {
  const int64_t first = block * kBackwardRows, left = a.M - first, count = left < kBackwardRows ? left : kBackwardRows;
  return {first, count, (count + multiple - 1) / multiple * multiple};
}

// A chunk of inputs; `padded` are those that have codes.
struct Inputs {
  int64_t first, count, padded;
};

FW_INLINE Inputs inputs_of(const BackwardArgs& a, int64_t chunk) {
  const Weight& w = a.weight;
  const int64_t first = chunk * kBackwardInputs, left = w.K - first, coded = w.groups * w.group - first;
  return {first, left < kBackwardInputs ? left : kBackwardInputs, coded < kBackwardInputs ? coded : kBackwardInputs};
}

// f(g, from, to) for the parts of groups that inputs [begin, end) are, from and to within the group.
template <typename F>
FW_INLINE void for_groups(const Weight& w, int64_t begin, int64_t end, const F& f) {
  for (int64_t g = begin / w.group; g * w.group < end; ++g) {
    const int64_t first = g * w.group, from = begin > first ? begin - first : 0;
    f(g, from, end - first < w.group ? end - first : w.group);
  }
}

}  // namespace fastweights::quantization::FW_LEVEL
