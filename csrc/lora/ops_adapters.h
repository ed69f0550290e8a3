// The arguments of both ops but the routing, checked and laid out for the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "core/check.h"
#include "core/cpu_level.h"
#include "core/parallel.h"
#include "lora/ops_routing.h"

namespace fastweights::lora {

using Tensors = std::vector<Tensor>;

// The size of the last dimension.
inline int64_t row_size(const char* op, const char* name, const Tensor& t, const char* letters) {
  check_cpu(op, name, t);
  check_floating(op, name, t);
  check(t.dim() >= 1, op, "expected ", name, " of shape [..., ", letters, "], got []");
  return t.size(t.dim() - 1);
}

// The rows of x: its shape but for the last dimension, and its dtype.
inline void check_rows_of(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_same_dtype(op, name, t, "x", x);
  check(t.dim() == x.dim() && same_sizes(t, x, x.dim() - 1), op, "expected ", name,
        " of x's shape but for the last dimension, got ", shape_of(t), " and ", shape_of(x));
}

inline void check_shape_of_x(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_cpu(op, name, t);
  check_same_dtype(op, name, t, "x", x);
  check(t.dim() == x.dim() && same_sizes(t, x, x.dim()), op, "expected ", name, " of shape ", shape_of(x),
        " (from x), got ", shape_of(t));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  check(t.is_contiguous(), op, "expected ", name, " to be contiguous, got strides that are not");
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

inline std::vector<double> numbers_of(const Tensor& t) {
  std::vector<double> numbers;
  const bool single = t.scalar_type() == ScalarType::Float;  // the usual ones, without a call into torch
  const Tensor owner = single ? t : in_dtype(t, ScalarType::Double);
  const int64_t step = owner.numel() > 1 ? owner.stride(0) : 1;
  for (int64_t i = 0; i < owner.numel(); ++i) {
    numbers.push_back(single ? double(static_cast<const float*>(owner.const_data_ptr())[i * step])
                             : static_cast<const double*>(owner.const_data_ptr())[i * step]);
  }
  return numbers;
}

// Between the rows of a transpose: rows of a power of two would all lie in the same few sets of the cache.
constexpr int64_t kPadding = 16;

inline void run_transpose(const TransposeArgs& args) {
  if (args.rows == 0 || args.in.columns == 0) return;
  parallel_tasks((args.rows + kTransposeRows - 1) / kTransposeRows, 4.0 * double(kTransposeRows * args.in.columns),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(transpose)(args, begin, end); });
}

// Where the projections begin whose outputs lie side by side, and the sum of their sizes; {0, O} for one.
inline std::vector<int64_t> starts_of_split(const char* op, const std::vector<int64_t>& split, int64_t O) {
  if (split.empty()) return {0, O};
  std::vector<int64_t> starts{0};
  for (const int64_t size : split) {
    check(size >= 0 && size <= O - starts.back(), op, "expected split into sizes that add up to out_features = ", O,
          ", got ", size, " at ", starts.size() - 1);
    starts.push_back(starts.back() + size);
  }
  check(starts.back() == O, op, "expected split into sizes that add up to out_features = ", O, ", got ", starts.back());
  return starts;
}

// Pairs of A and B: as many in a row as there are projections are one adapter, the p-th for the p-th projection.
struct Adapters {
  ScalarType arithmetic;
  std::vector<int64_t> first{0};  // rank of pair i among those of all; ends with their sum
  std::vector<double> factors;    // of a rank: the scale of its pair
  // One per rank, set by `lay_out_a` and `lay_out_b`.
  std::vector<const void*> a_rows, b_rows;

  Adapters(const char* op, const Tensor& x, int64_t D, int64_t O, const Tensors& lora_a, const Tensors& lora_b,
           const Tensor& scale, const std::vector<int64_t>& split)
      : arithmetic(state_dtype(x.scalar_type())),
        out_features_(O),
        starts_(starts_of_split(op, split, O)),
        lora_a_(lora_a),
        lora_b_(lora_b) {
    const size_t n = lora_a.size();
    check(int64_t(n) % projections() == 0, op, "expected a lora_a for each of ", projections(),
          " projections (from split) and adapter, got ", n);
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
      check_shape(op, "lora_b", lora_b[i], {outputs(int64_t(i)), rank}, "[out_features, rank]",
                  split.empty() ? "y and lora_a" : "split and lora_a");
      first.push_back(ranks() + rank);
      factors.insert(factors.end(), size_t(rank), factor[i]);
    }
  }

  int64_t ranks() const { return first.back(); }
  int64_t projections() const { return int64_t(starts_.size()) - 1; }
  int64_t start(int64_t pair) const { return starts_[size_t(pair % projections())]; }
  int64_t outputs(int64_t pair) const { return starts_[size_t(pair % projections()) + 1] - start(pair); }

  int64_t pairs_of_group(const Routing& routing) const {
    return routing.routed ? projections() : int64_t(first.size()) - 1;
  }

  // Of all groups, each with as many: one of all ranks where there is one projection, else one for each pair.
  std::vector<Part> parts(const Routing& routing) const {
    std::vector<Part> parts;
    for (const Block& g : routing.groups) {
      if (projections() == 1) {
        parts.push_back({0, g.ranks, 0, out_features_});
        continue;
      }
      for (int64_t i = g.part; i < g.part + pairs_of_group(routing); ++i) {
        parts.push_back({first[size_t(i)] - g.rank, first[size_t(i) + 1] - first[size_t(i)], start(i), outputs(i)});
      }
    }
    return parts;
  }

  // A as it is read. Only for adapters that rows meet: a server holds hundreds, of which a batch asks for a few.
  void lay_out_a(const Routing& routing) {
    a_rows.resize(size_t(ranks()));
    for (size_t i = 0; i < lora_a_.size(); ++i) {
      if (!routing.reaches(first[i], first[i + 1])) continue;
      kept_.push_back(with_contiguous_last(in_dtype(lora_a_[i], arithmetic)));
      const Tensor& a = kept_.back();
      for (int64_t r = first[i]; r < first[i + 1]; ++r) {
        a_rows[size_t(r)] = static_cast<const char*>(a.data_ptr()) + (r - first[i]) * a.stride(0) * size();
      }
    }
  }

  // B turned, times its scale.
  void lay_out_b(const Routing& routing) {
    const int64_t ld = out_features_ + kPadding;
    b_rows.resize(size_t(ranks()));
    transposed_.reset(new char[size_t(ranks() * ld * size())]);
    for (size_t i = 0; i < lora_b_.size(); ++i) {
      if (!routing.reaches(first[i], first[i + 1])) continue;
      for (int64_t r = first[i]; r < first[i + 1]; ++r) b_rows[size_t(r)] = transposed_.get() + r * ld * size();
      const Up b = up(i);
      run_transpose({b.element,
                     element_of(arithmetic),
                     b.b,
                     {transposed_.get() + first[i] * ld * size(), ld, outputs(int64_t(i))},
                     outputs(int64_t(i)),
                     b.factor});
    }
  }

  // B of a pair as it lies, where its type can be turned into that of the arithmetic by a kernel.
  Up up(size_t pair) {
    const ScalarType type = lora_b_[pair].scalar_type();
    const bool wide = arithmetic == ScalarType::Double || type == ScalarType::Double;
    kept_.push_back(with_contiguous_last(wide ? in_dtype(lora_b_[pair], arithmetic) : lora_b_[pair]));
    const Tensor& b = kept_.back();
    const int64_t rank = first[pair + 1] - first[pair];
    return {element_of(b.scalar_type()), {b.data_ptr(), b.stride(0), rank}, rank ? factors[size_t(first[pair])] : 0, 0};
  }

  int64_t size() const { return arithmetic == ScalarType::Double ? sizeof(double) : sizeof(float); }

  int64_t size_of_b() const {
    int64_t size = 0;
    for (const Tensor& b : lora_b_) size += b.numel();
    return size;
  }

  // Gradients of padded rows to one [out_features, rank] after the other.
  void transpose_back(const Tensor& rows, Tensor& flat) const {
    const int64_t ld = out_features_ + kPadding;
    char* to = static_cast<char*>(flat.data_ptr());
    for (size_t i = 0; i < lora_a_.size(); ++i) {
      const int64_t rank = first[i + 1] - first[i], O = outputs(int64_t(i));
      run_transpose({element_of(arithmetic),
                     element_of(arithmetic),
                     {static_cast<char*>(rows.data_ptr()) + first[i] * ld * size(), ld, O},
                     {to, rank, rank},
                     rank,
                     1.0});
      to += rank * O * size();
    }
  }

 private:
  int64_t out_features_;
  std::vector<int64_t> starts_;
  const Tensors &lora_a_, &lora_b_;
  Tensors kept_;
  std::unique_ptr<char[]> transposed_;
};

}  // namespace fastweights::lora
