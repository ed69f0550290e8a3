// The arguments of both ops, checked and laid out for the kernels: adapters, the rows that meet each, dropout.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "core/check.h"
#include "core/cpu_level.h"
#include "core/parallel.h"
#include "lora/kernel.h"

namespace fastweights::lora {

using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// The size of the last dimension.
inline int64_t row_size(const char* op, const char* name, const Tensor& t, const char* letters) {
  check_cpu(op, name, t);
  check_floating(op, name, t);
  check(t.dim() >= 1, op, "expected ", name, " of shape [..., ", letters, "], got []");
  return t.size(t.dim() - 1);
}

inline bool same_sizes(const Tensor& a, const Tensor& b, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

// y or dy: x's shape but for the last dimension, and x's dtype.
inline void check_prefix(const char* op, const Tensor& y, const Tensor& x) {
  check_same_dtype(op, "y", y, "x", x);
  check(y.dim() == x.dim() && same_sizes(y, x, x.dim() - 1), op,
        "expected y of x's shape but for the last dimension, got ", shape_of(y), " and ", shape_of(x));
}

inline void check_same_shape_as_x(const char* op, const Tensor& dx, const Tensor& x) {
  check_cpu(op, "dx", dx);
  check_same_dtype(op, "dx", dx, "x", x);
  check(dx.dim() == x.dim() && same_sizes(dx, x, x.dim()), op, "expected dx of shape ", shape_of(x), " (from x), got ",
        shape_of(dx));
}

// [rows, columns] of any row stride, without a copy where the rows lie evenly.
inline Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2) return with_contiguous_last(t);
  return torch::stable::contiguous(t);
}

inline int64_t stride_of(const Tensor& t) {
  return t.dim() == 2 ? t.stride(0) : t.size(t.dim() - 1);
}

inline Dropout dropout_of(const char* op, double p, const OptionalTensor& seed) {
  check(p >= 0 && p < 1, op, "expected 0 <= dropout < 1, got ", p);
  if (p == 0) return {};
  check(seed.has_value(), op, "expected a seed for dropout ", p, ", got None");
  check_cpu(op, "seed", *seed);
  check_dtype(op, "seed", *seed, ScalarType::Long, "");
  check(seed->numel() == 1, op, "expected a seed of one number, got shape ", shape_of(*seed));
  const double kept = std::min(std::ldexp(1 - p, 32), 4294967295.0);
  return {true, uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr())), uint32_t(kept), 1 / (1 - p)};
}

// Between the rows of a transpose: rows of a power of two would all lie in the same few sets of the cache.
constexpr int64_t kPadding = 16;

inline std::vector<double> numbers_of(const Tensor& t) {
  std::vector<double> numbers;
  const bool plain = t.scalar_type() == ScalarType::Float;  // the usual one, without a call into torch
  const Tensor owner = plain ? t : torch::stable::contiguous(in_dtype(t, ScalarType::Double));
  const int64_t step = plain && t.numel() > 1 ? t.stride(0) : 1;
  for (int64_t i = 0; i < t.numel(); ++i) {
    numbers.push_back(plain ? double(static_cast<const float*>(t.const_data_ptr())[i * step])
                            : static_cast<const double*>(owner.const_data_ptr())[i]);
  }
  return numbers;
}

// A as it lies where its type is that of the arithmetic; Bᵀ times the scale.
struct Adapters {
  ScalarType arithmetic;
  int64_t ranks = 0;
  std::vector<int64_t> first;               // of adapter i, in all ranks; ends with `ranks`
  std::vector<const void*> a_rows, b_rows;  // [ranks]
  std::vector<double> factors;              // [ranks]: the scale of a rank's adapter

  Adapters(const char* op, const Tensor& x, int64_t D, int64_t O, const Tensors& lora_a, const Tensors& lora_b,
           const Tensor& scale)
      : arithmetic(x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float), out_features_(O) {
    const size_t n = lora_a.size();
    check(lora_b.size() == n, op, "expected as many lora_b as lora_a = ", n, ", got ", lora_b.size());
    check_cpu(op, "scale", scale);
    check_floating(op, "scale", scale);
    check_shape(op, "scale", scale, {int64_t(n)}, "[adapters]", "lora_a");
    const std::vector<double> factor = numbers_of(scale);
    for (size_t i = 0; i < n; ++i) {
      check_cpu(op, "lora_a", lora_a[i]);
      check_floating(op, "lora_a", lora_a[i]);
      check_rank(op, "lora_a", lora_a[i], 2, "[rank, in_features]");
      const int64_t rank = lora_a[i].size(0);
      check_shape(op, "lora_a", lora_a[i], {rank, D}, "[rank, in_features]", "x");
      check_cpu(op, "lora_b", lora_b[i]);
      check_floating(op, "lora_b", lora_b[i]);
      check_shape(op, "lora_b", lora_b[i], {O, rank}, "[out_features, rank]", "y and lora_a");
      first.push_back(ranks);
      ranks += rank;
      factors.insert(factors.end(), size_t(rank), factor[i]);
    }
    first.push_back(ranks);
    const size_t size = arithmetic == ScalarType::Double ? sizeof(double) : sizeof(float);
    for (size_t i = 0; i < n; ++i) {
      a_.push_back(with_contiguous_last(in_dtype(lora_a[i], arithmetic)));
      for (int64_t r = 0; r < a_[i].size(0); ++r)
        a_rows.push_back(static_cast<const char*>(a_[i].data_ptr()) + r * a_[i].stride(0) * int64_t(size));
    }
    const int64_t ld = O + kPadding;
    transposed_.reset(new char[size_t(ranks * ld) * size]);
    for (int64_t r = 0; r < ranks; ++r) b_rows.push_back(transposed_.get() + size_t(r * ld) * size);
    for (size_t i = 0; i < n; ++i) {
      const bool wide = arithmetic == ScalarType::Double || lora_b[i].scalar_type() == ScalarType::Double;
      const Tensor b = with_contiguous_last(wide ? in_dtype(lora_b[i], arithmetic) : lora_b[i]);
      const int64_t rank = first[i + 1] - first[i];
      const Matrix in{b.data_ptr(), b.stride(0), rank};
      const Matrix out{const_cast<void*>(rank ? b_rows[size_t(first[i])] : nullptr), ld, O};
      const Transposition item{in, out, O, 0, rank ? factors[size_t(first[i])] : 0.0};
      run(&item, 1, element_of(b.scalar_type()), element_of(arithmetic));
    }
  }

  // Gradients of padded rows to one [out_features, rank] after the other.
  void transpose_back(const Tensor& rows, Tensor& flat) const {
    const int64_t O = out_features_, ld = O + kPadding;
    const int64_t size = arithmetic == ScalarType::Double ? sizeof(double) : sizeof(float);
    for (size_t i = 0; i + 1 < first.size(); ++i) {
      const int64_t rank = first[i + 1] - first[i], at = first[i] * size;
      const Matrix in{static_cast<char*>(rows.data_ptr()) + at * ld, ld, O};
      const Matrix out{static_cast<char*>(flat.data_ptr()) + at * O, rank, rank};
      const Transposition item{in, out, rank, 0, 1.0};
      run(&item, 1, element_of(arithmetic), element_of(arithmetic));
    }
  }

 private:
  static void run(const Transposition* items, int64_t count, Element from, Element to) {
    const Transposition& t = *items;
    if (t.rows == 0 || t.in.columns == 0) return;
    const TransposeArgs args{from, to, items, count};
    parallel_tasks((t.rows + kTransposeRows - 1) / kTransposeRows, 4.0 * double(kTransposeRows * t.in.columns),
                   [&](int64_t begin, int64_t end) { FW_KERNEL(transpose)(args, begin, end); });
  }

  int64_t out_features_;
  Tensors a_;
  std::unique_ptr<char[]> transposed_;
};

// Which rows meet which adapter.
struct Rows {
  int64_t M, width;
  std::vector<Block> groups;   // one per adapter, or one of all rows and all ranks
  std::vector<int64_t> order;  // empty: rows lie in the order of their groups

  Rows(const char* op, const Tensor& x, const Adapters& adapters, const OptionalTensor& segments,
       const OptionalTensor& indices) {
    const int64_t n = int64_t(adapters.first.size()) - 1;
    M = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
    check(!segments || !indices, op, "expected segments or indices, got both");
    width = adapters.ranks;
    if (!segments && !indices) {
      groups.push_back({0, M, 0, adapters.ranks});
      return;
    }
    width = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t rank = adapters.first[size_t(i)];
      groups.push_back({0, 0, rank, adapters.first[size_t(i) + 1] - rank});
      width = std::max(width, groups.back().ranks);
    }
    segments ? read_segments(op, *segments, n) : read_indices(op, *indices, x, n);
  }

  bool plain() const { return groups.size() == 1 && groups[0].count == M; }
  const int64_t* order_data() const { return order.empty() ? nullptr : order.data(); }

  std::vector<Block> blocks() const {
    std::vector<Block> blocks;
    for (const Block& g : groups) {
      if (g.ranks == 0) continue;
      const int64_t size = g.count >= 8 * kManyRows ? kManyRows : kFewRows;
      for (int64_t i = 0; i < g.count; i += size)
        blocks.push_back({g.first + i, std::min(size, g.count - i), g.rank, g.ranks});
    }
    return blocks;
  }

 private:
  static Tensor numbers(const char* op, const char* name, const Tensor& t) {
    check_cpu(op, name, t);
    const bool fits = t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int;
    check(fits, op, "expected ", name, " of dtype int64 or int32, got ", dtype_name(t.scalar_type()));
    return torch::stable::contiguous(in_dtype(t, ScalarType::Long));
  }

  void read_segments(const char* op, const Tensor& t, int64_t n) {
    check_shape(op, "segments", t, {n + 1}, "[adapters + 1]", "lora_a");
    const Tensor owner = numbers(op, "segments", t);
    const int64_t* s = static_cast<const int64_t*>(owner.const_data_ptr());
    for (int64_t i = 0; i <= n; ++i) {
      check(s[i] >= (i ? s[i - 1] : 0) && s[i] <= M, op, "expected segments to ascend within 0 and ", M, " rows, got ",
            s[i], " at ", i);
      if (i) groups[size_t(i) - 1].first = s[i - 1], groups[size_t(i) - 1].count = s[i] - s[i - 1];
    }
  }

  void read_indices(const char* op, const Tensor& t, const Tensor& x, int64_t n) {
    check(t.dim() < x.dim() && same_sizes(t, x, t.dim()), op,
          "expected indices of a shape that x's begins with (all but its last dimension at most), got ", shape_of(t),
          " for x of shape ", shape_of(x));
    const Tensor owner = numbers(op, "indices", t);
    const int64_t* index = static_cast<const int64_t*>(owner.const_data_ptr());
    const int64_t count = owner.numel(), rows = count ? M / count : 0;
    for (int64_t i = 0; i < count; ++i) {
      check(index[i] >= -1 && index[i] < n, op, "expected indices from -1 to ", n - 1, ", got ", index[i]);
      if (index[i] >= 0) groups[size_t(index[i])].count += rows;
    }
    int64_t next = 0;
    for (Block& g : groups) g.first = next, next += g.count;
    order.resize(size_t(next) + 1);  // never empty: an order of no rows is one
    std::vector<int64_t> end;
    for (const Block& g : groups) end.push_back(g.first);
    for (int64_t i = 0; i < count; ++i) {
      if (index[i] < 0) continue;
      for (int64_t r = 0; r < rows; ++r) order[size_t(end[size_t(index[i])]++)] = i * rows + r;
    }
  }
};

}  // namespace fastweights::lora
