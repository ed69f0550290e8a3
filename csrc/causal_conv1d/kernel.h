// What ops.cpp hands to the kernels: y_t = act(bias + sum_w weight_w x_{t - W + 1 + w}) + residual_t for each channel,
// where what lies before a sequence is its initial state, or zero.
#pragma once

#include "core/levels.h"

namespace fastweights::causal_conv1d {

// Tokens and channels of a task where channels are contiguous (rows), and where time is (lines).
constexpr int64_t kRowTokens = 128, kRowChannels = 512;
constexpr int64_t kLineTokens = 2048, kLineChannels = 8;

// [B, T, D], strides in elements; one of time and channel is 1.
struct Signal {
  void* data = nullptr;
  int64_t batch = 0, time = 0, channel = 0;
};

// [N, D, S]: the latest S >= W - 1 inputs of each sequence, the last one last.
struct State {
  void* data = nullptr;
  int64_t sequence = 0, channel = 0, time = 0;
};

// Tokens [begin, end) of a batch entry see each other and nothing else but row `initial` of the initial state. Row
// `final` of the final state is theirs. -1: none.
struct Segment {
  int64_t batch, begin, end, initial, final;
};

// Tokens [begin, end) of a segment.
struct Tile {
  int64_t segment, begin, end;
};

struct Problem {
  Signal x;
  Element element;            // of signals and states
  const void *weight, *bias;  // [W, D] and [D] in the type of the arithmetic; bias may be null
  bool silu, lines;
  int64_t B, T, D, W, S;
  const Segment* segments;
  const Tile* tiles;
  int64_t tile_count, channel_blocks;
  State initial;  // null: zeros
};

// Task tile * channel_blocks + block, here and in the backward.
struct ForwardArgs {
  Problem p;
  Signal y, residual;
  State final;
};

struct BackwardArgs {
  Problem p;
  Signal dy, dx;
  State dinitial, dfinal;
  void* partial;  // [tiles, W + 1, D]: gradients of weight and, in the last row, of bias, in the type of the arithmetic
};

// y [B, L, D] from the state and x; the state moves on. Task b * channel_blocks + block of kRowChannels channels.
struct UpdateArgs {
  Signal x, y, residual;
  Element element;
  const void *weight, *bias;
  bool silu;
  int64_t L, D, W, S, channel_blocks;
  State state;
  const int64_t* rows;   // which row of the state belongs to each batch entry; null: its number
  const int64_t* slots;  // null, or each state is a ring, and this is where the first token goes, below S
};

FW_DECLARE_KERNEL(forward, ForwardArgs)
FW_DECLARE_KERNEL(backward, BackwardArgs)
FW_DECLARE_KERNEL(update, UpdateArgs)

}  // namespace fastweights::causal_conv1d
