// What the torch side and the kernels of a gated recurrence over tokens agree on, whatever its update rule: how tensors
// lie in memory, which sequences and heads there are, how the work is split.
#pragma once

#include "core/levels.h"

namespace fastweights {

// Tokens between two states that a forward keeps for the backward.
constexpr int64_t kSegment = 64;

enum class Gate : int { none, head, token, channel };
enum class Form : int { recurrent, chunked };

// [B, T, heads, n] with contiguous rows; strides in elements.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, time = 0, head = 0;
  Element element = Element::f32;
};

// One state per sequence and head, in the type of the arithmetic: S [N, HV, K, V] by strides, and with a normaliser z
// [N, HV, K] contiguous.
struct States {
  void* S = nullptr;
  int64_t sequence = 0, head = 0, key = 0, value = 0;
  void* z = nullptr;
};

// Task (n * tiles + tile) * HV + h is sequence n, value head h and the columns of V in `tile`.
struct Recurrence {
  int64_t sequences, T, H, HV, K, V;
  const int64_t* starts;      // [sequences + 1] among all tokens; null: each sequence is a batch entry of T tokens
  int64_t tiles, tile_width;  // V in tiles of tile_width columns, the last one may be narrower
  int64_t cache;              // bytes of a core's second-level cache
  bool normalize;             // a state has one more column: the normaliser's z
  bool reverse;               // from the last token to the first
};

// out[b, t, h] = sum over tiles and over the value heads of h of in[b, t, tile * HV + head]; task b * T + t.
struct SumHeadsArgs {
  Rows in, out;
  int64_t T, H, HV, K, tiles;
};

FW_DECLARE_KERNEL(sum_heads, SumHeadsArgs)

}  // namespace fastweights
