// From tensors to what the kernels read: the checks that window and hybrid attention share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "attention/kernel.h"
#include "core/check.h"
#include "core/pages.h"

namespace fastweights::attention {

using OptionalTensor = std::optional<Tensor>;

// Keeps alive what `in` points to.
struct Arguments {
  const char* op;
  Inputs in{};
  int64_t B = 0, T = 0;
  std::vector<int64_t> bounds{};
  std::vector<Tensor> held{};

  // The dtype of accumulation and state.
  ScalarType compute() const { return in.element == Element::f64 ? ScalarType::Double : ScalarType::Float; }

  Rows rows(const Tensor& t) {
    held.push_back(with_contiguous_last(t));
    const Tensor& kept = held.back();
    return {kept.const_data_ptr(), kept.stride(0), kept.stride(1), kept.stride(2)};
  }

  const void* contiguous(const Tensor& t) {
    held.push_back(torch::stable::contiguous(t));
    return held.back().const_data_ptr();
  }

  Tensor make(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return in_huge_pages(torch::stable::new_empty(held.front(), {sizes.begin(), sizes.size()}, dtype));
  }

  Tensor make_zeros(std::initializer_list<int64_t> sizes) const {
    return torch::stable::new_zeros(held.front(), {sizes.begin(), sizes.size()}, compute());
  }

  Tensor absent() const { return make({0}, compute()); }
};

inline void check_groups(const char* op, const char* name, int64_t heads, int64_t query_heads) {
  check(heads > 0 && query_heads % heads == 0, op, "expected the heads of ", name, " to divide the ", query_heads,
        " heads of q, got ", heads);
}

inline std::vector<int64_t> sequence_bounds(const char* op, const Tensor& cu_seqlens, int64_t batch, int64_t length) {
  const ScalarType dtype = cu_seqlens.scalar_type();
  check(dtype == ScalarType::Int || dtype == ScalarType::Long, op, "expected cu_seqlens of dtype int32 or int64, got ",
        dtype_name(dtype));
  check_cpu(op, "cu_seqlens", cu_seqlens);
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op, "expected cu_seqlens of shape [N + 1], got ",
        shape_of(cu_seqlens));
  check(batch == 1, op, "expected q with B = 1 beside cu_seqlens, got B = ", batch);
  const Tensor kept = torch::stable::contiguous(cu_seqlens);
  std::vector<int64_t> bounds(kept.size(0));
  for (size_t n = 0; n < bounds.size(); ++n) {
    bounds[n] = dtype == ScalarType::Int ? static_cast<const int32_t*>(kept.const_data_ptr())[n]
                                         : static_cast<const int64_t*>(kept.const_data_ptr())[n];
    check(bounds[n] >= (n ? bounds[n - 1] : 0), op, "expected cu_seqlens to ascend from 0, got ", bounds[n],
          " at index ", n);
  }
  check(bounds.front() == 0 && bounds.back() == length, op, "expected cu_seqlens to run from 0 to T = ", length,
        ", got ", bounds.front(), " to ", bounds.back());
  return bounds;
}

inline Arguments read_softmax_part(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const OptionalTensor& cu_seqlens, int64_t window, double scale) {
  check_rank(op, "q", q, 4, "[B, T, HQ, K]");
  check_rank(op, "k", k, 4, "[B, T, HKV, K]");
  check_rank(op, "v", v, 4, "[B, T, HKV, V]");
  check_floating(op, "q", q);
  Arguments a{op};
  a.B = q.size(0);
  a.T = q.size(1);
  Inputs& in = a.in;
  in.HQ = q.size(2);
  in.K = q.size(3);
  in.HKV = k.size(2);
  in.V = v.size(3);
  check_shape(op, "k", k, {a.B, a.T, in.HKV, in.K}, "[B, T, HKV, K]", "q");
  check_shape(op, "v", v, {a.B, a.T, in.HKV, in.V}, "[B, T, HKV, V]", "k");
  check_groups(op, "k", in.HKV, in.HQ);
  check_cpu(op, "q", q);
  for (const auto& [name, t] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    check_same_dtype(op, name, *t, "q", q);
    check_cpu(op, name, *t);
  }
  check(window >= 1, op, "expected window of at least 1, got ", window);
  in.element = element_of(q.scalar_type());
  in.window = window;
  in.scale = scale;
  in.HF = in.HG = in.HS = 1;
  in.length = a.T;
  in.sequences = a.B;
  if (cu_seqlens) {
    a.bounds = sequence_bounds(op, *cu_seqlens, a.B, a.T);
    in.packed = true;
    in.bounds = a.bounds.data();
    in.sequences = int64_t(a.bounds.size()) - 1;
  }
  in.q = a.rows(q);
  in.k = a.rows(k);
  in.v = a.rows(v);
  return a;
}

// Floating-point operations of the forward per query and head, for splitting the work.
inline double flops_per_query(const Inputs& in) {
  return 2.0 * double(in.window) * double(in.K + in.V) + 4.0 * double(in.F) * double(in.V);
}

}  // namespace fastweights::attention
