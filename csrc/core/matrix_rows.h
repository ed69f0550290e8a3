// A tensor of any rank as the rows of a matrix, for ops that treat its leading dimensions alike.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastweights {

using torch::stable::Tensor;

// [..., width] without a copy where its leading dimensions have one stride between them; `owner` keeps the data alive.
struct MatrixRows {
  Tensor owner;
  const void* data;
  int64_t count, stride;
};

inline MatrixRows matrix_rows_of(const Tensor& t) {
  const auto rows_in_place = [&] {
    const int64_t d = t.dim();
    if (d == 0 || (t.size(d - 1) > 1 && t.stride(d - 1) != 1)) return false;
    for (int64_t i = 0; i + 2 < d; ++i) {
      if (t.size(i) != 1 && t.stride(i) != t.size(i + 1) * t.stride(i + 1)) return false;
    }
    return true;
  };
  const Tensor owner = rows_in_place() ? t : torch::stable::contiguous(t);
  const int64_t d = owner.dim(), width = owner.size(d - 1);
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < d; ++i) count *= owner.size(i);
  return {owner, owner.const_data_ptr(), count, d > 1 ? owner.stride(d - 2) : width};
}

// [..., width] with the leading dimensions of t.
inline Tensor new_rows(const Tensor& t, int64_t width) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = width;
  return torch::stable::new_empty(t, sizes);
}

}  // namespace fastweights
