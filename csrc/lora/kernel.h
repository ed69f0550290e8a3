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

constexpr int64_t kManyRows = 32;  // of a task, at most

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
  // For the tile registers of AMX (tiles.cpp): what a block shrinks and expands by. Forward: down of its group, up of
  // each part; backward: down of each part, up of its group.
  const uint32_t *const *down_tiles, *const *up_tiles;
};

// B of a pair as it lies, [columns, ranks]; its ranks begin at `rank` of the term.
struct Up {
  Element element;
  Matrix b;
  double factor;
  int64_t rank;
};

// What is added to outputs with one rounding: the sum over `ranks`, which c has from `column` on.
struct Term {
  int64_t column, ranks;
  const Up* ups;
  int64_t up_count;
};

// Rows of a group that are few, at most; ranks and outputs of a task of theirs.
constexpr int64_t kFewRows = 32, kFewRanks = 8, kFewOutputs = 64;

// kFewRanks ranks, from `rank` on, of the rows [first, first + count); `column` is where c has them.
struct RanksTask {
  int64_t first, count, rank, ranks, column;
};

// Up to kFewOutputs outputs of those rows: columns [begin, begin + columns) of out, which are the rows from `row` of B.
struct OutputsTask {
  int64_t first, count, begin, columns, row;
  const Term* terms;
  int64_t term_count;
};

// An update of at most kFewRows rows of a group: what it takes is to have A and B out of memory, once and as they lie,
// by all threads. First all of c, then out.
struct FewArgs {
  Element element;
  const int64_t* order;
  Matrix in, out, c;
  const void* const* down;
  Dropout in_dropout;
  const RanksTask* ranks;
  const OutputsTask* outputs;
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
  const uint32_t* const* c_tiles;  // for gradient_tiles, of each group
};

constexpr int64_t kTransposeRows = 128;

// out[j, i] = factor in[i, j]. Task: kTransposeRows rows of in.
struct TransposeArgs {
  Element from, to;
  Matrix in, out;
  int64_t rows;
  double factor;
};

// Rows of float [ranks][columns] as the tile registers read them, see tiles.cpp. Task: 32 columns of down, 16 of up.
struct TilesArgs {
  const void* const* rows;
  int64_t ranks, columns;
  bool up;
  uint32_t* out;
};

// `ranks` columns of c, float, of a group's rows, likewise. Task: 32 rows.
struct ColumnsArgs {
  const int64_t* order;
  Matrix c;
  int64_t first, count, column, ranks;
  uint32_t* out;
};

// In tiles; words. c has the size of down, with rows for columns.
constexpr int64_t down_tiles_size(int64_t ranks, int64_t columns) {
  return (columns + 31) / 32 * ((2 * ranks + 15) / 16) * 256;
}
constexpr int64_t up_tiles_size(int64_t ranks, int64_t columns) {
  return (columns + 15) / 16 * ((3 * ranks + 31) / 32) * 256;
}

FW_DECLARE_KERNEL(update, UpdateArgs)
FW_DECLARE_KERNEL(shrink_few, FewArgs)
FW_DECLARE_KERNEL(expand_few, FewArgs)
FW_DECLARE_KERNEL(gradient, GradientArgs)
FW_DECLARE_KERNEL(transpose, TransposeArgs)

// The same for bfloat16 rows through the tile registers, at the level avx512_bf16 where the machine has them.
FW_DECLARE_KERNEL(pack_tiles, TilesArgs)
FW_DECLARE_KERNEL(update_tiles, UpdateArgs)
FW_DECLARE_KERNEL(pack_c_tiles, ColumnsArgs)
FW_DECLARE_KERNEL(gradient_tiles, GradientArgs)

}  // namespace fastweights::lora
