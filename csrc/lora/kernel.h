// What ops.cpp hands to the kernels. A low-rank update is two skinny products: c = in downᵀ and out += c up. Forward:
// in = x, down = A, up = scale Bᵀ, out = y. Backward: in = dy, down = scale Bᵀ, up = A, out = dx.
#pragma once

#include "core/levels.h"

namespace fastweights::lora {

// Of the ranks of an adapter those, from `rank` on, that belong to the outputs [begin, begin + columns).
struct Part {
  int64_t rank, ranks, begin, columns;
};

// Rows that meet the same adapter: order[first], ..., order[first + count - 1] (order null: the numbers themselves),
// and what they meet: `ranks` rows of down and up, from `rank`. Its parts begin at `part`.
struct Block {
  int64_t first, count, rank, ranks, part;
};

constexpr int64_t kFewRows = 8, kManyRows = 32;  // of a task

struct Matrix {
  void* data;
  int64_t stride, columns;  // rows are contiguous
};

// A number of row m and column j is kept where its random bits are below `threshold`, and multiplied by `factor`.
struct Dropout {
  bool on;
  uint64_t seed;
  uint32_t threshold;
  double factor;
};

// Task: a block of at most kManyRows rows. down, up and c are in the type of the arithmetic. Rows of Bᵀ are as long as
// the part of the outputs that they belong to, which are columns of out in the forward and of in in the backward.
struct UpdateArgs {
  Element element;
  bool backward;
  const Part* parts;
  int64_t parts_of_block;
  const Block* blocks;
  const int64_t* order;
  Matrix in, out;
  const void *const *down, *const *up;
  Matrix c;  // columns: ranks of the block
  Dropout in_dropout, out_dropout;
};

constexpr int64_t kGradientColumns = 64, kGradientRows = 128;

// out[rank + r, :] = factor sum over the rows m of a group of c[m, r] in[m, :]. Task: kGradientColumns columns of a
// group.
struct GradientArgs {
  Element element;
  const Block* groups;
  const int64_t* c_columns;  // where c has the ranks of a group
  int64_t strips;            // tasks of a group
  const int64_t* order;
  Matrix in, c, out;
  const double* factors;  // one per row of out
  Dropout in_dropout;
};

constexpr int64_t kTransposeRows = 128;

// out[j, i] = factor in[i, j]. Task: kTransposeRows rows of in.
struct TransposeArgs {
  Element from, to;
  Matrix in, out;
  int64_t rows;
  double factor;
};

FW_DECLARE_KERNEL(update, UpdateArgs)
FW_DECLARE_KERNEL(gradient, GradientArgs)
FW_DECLARE_KERNEL(transpose, TransposeArgs)

}  // namespace fastweights::lora
