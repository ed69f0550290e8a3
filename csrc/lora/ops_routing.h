// Which rows meet which adapter.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "core/check.h"
#include "lora/kernel.h"

namespace fastweights::lora {

using OptionalTensor = std::optional<Tensor>;

inline bool same_sizes(const Tensor& a, const Tensor& b, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

struct Routing {
  int64_t M, width;            // rows, and ranks that one of them meets at most
  bool routed;                 // whether rows meet one adapter at most
  std::vector<Block> groups;   // one per adapter, or one of all rows and all ranks
  std::vector<int64_t> order;  // empty: rows lie in the order of their groups

  // `first_of_pairs` are the ranks where pairs of A and B begin, ending with their sum; `parts` of them are an adapter.
  Routing(const char* op, const Tensor& x, const std::vector<int64_t>& first_of_pairs, int64_t parts,
          const OptionalTensor& segments, const OptionalTensor& indices) {
    std::vector<int64_t> first;
    for (size_t i = 0; i < first_of_pairs.size(); i += size_t(parts)) first.push_back(first_of_pairs[i]);
    const int64_t n = int64_t(first.size()) - 1;
    M = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
    check(!segments || !indices, op, "expected segments or indices, got both");
    width = first.back();
    routed = segments || indices;
    if (!routed) {
      groups.push_back({0, M, 0, first.back(), 0});
      return;
    }
    width = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t rank = first[size_t(i)];
      groups.push_back({0, 0, rank, first[size_t(i) + 1] - rank, i * parts});
      width = std::max(width, groups.back().ranks);
    }
    segments ? read_segments(op, *segments, n) : read_indices(op, *indices, x, n);
  }

  // Whether a row meets the adapter of these ranks.
  bool reaches(int64_t rank, int64_t end) const {
    for (const Block& g : groups) {
      if (g.count > 0 && rank < end && g.rank < end && rank < g.rank + g.ranks) return true;
    }
    return false;
  }

  // Whether every row meets all that `width` has room for.
  bool plain() const { return groups.size() == 1 && groups[0].count == M && groups[0].ranks == width; }
  bool has_few_rows() const {
    return std::all_of(groups.begin(), groups.end(), [](const Block& g) { return g.count <= kFewRows; });
  }
  const int64_t* order_data() const { return order.empty() ? nullptr : order.data(); }

  // Of kManyRows rows where that makes `enough` of them, else of `few`.
  std::vector<Block> blocks(int64_t enough, int64_t few) const {
    std::vector<Block> blocks;
    for (const Block& g : groups) {
      if (g.ranks == 0) continue;
      const int64_t size = g.count >= enough * kManyRows ? kManyRows : few;
      for (int64_t i = 0; i < g.count; i += size)
        blocks.push_back({g.first + i, std::min(size, g.count - i), g.rank, g.ranks, g.part});
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
