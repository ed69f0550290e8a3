// Reading the packed weight: a line as vectors of 32-bit words (one output each), its codes and a group's parameters.
#pragma once

#include "core/vec.h"
#include "quantization/kernel.h"

namespace fastweights::quantization::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

using Words = Vec<int32_t>;
constexpr int kWords = kLanes<int32_t>;       // outputs per vector
constexpr int kParts = int(kStrip) / kWords;  // vectors per line
constexpr int64_t kAhead = 2048;              // bytes that the software prefetch runs ahead of the loads

template <Format F>
constexpr int64_t kLineInputs = F == Format::int4 ? 8 : 4;

FW_INLINE Words load_words(const uint8_t* line, int part) {
  return load(reinterpret_cast<const int32_t*>(line) + part * kWords);
}

// Logical shift: the nibbles of neighbours come along and are masked off by the caller.
FW_INLINE Words shift_right(Words w, int bits) {
  return bit_cast<Words>(bit_cast<Vec<uint32_t>>(w) >> bits);
}

// Byte t of every word as an integer times 2^(8t) for int4 (w holds a nibble per byte), as the signed byte for int8.
// Leaving the nibble where it is saves a shift; code_unit puts the power of two right, exactly.
template <Format F>
FW_INLINE Words code_at(Words w, int t) {
  if constexpr (F == Format::int4) {
    return w & (0x0f << (8 * t));
  } else {
    return (w << (24 - 8 * t)) >> 24;
  }
}

template <Format F>
constexpr float code_unit(int t) {
  return F == Format::int4 ? 1.0f / float(1 << (8 * t)) : 1.0f;
}

// Pins the order in which accumulators are updated: left alone, compilers gather products or broadcasts first and then
// spill, which costs a third of the speed.
template <typename V>
FW_INLINE void keep_in_register([[maybe_unused]] V& acc) {
#if defined(__x86_64__) && !defined(FW_WIDE)
  asm volatile("" : "+v"(acc));
#endif
}

// Where group g of a panel begins among the activations of M rows, for `each` numbers per row and group; the panel goes
// by its first row.
FW_INLINE int64_t panel_offset(int64_t M, int64_t groups, int64_t panel, int64_t g, int64_t each) {
  const int64_t block = panel / kRowBlock * kRowBlock, rows = M - block < kRowBlock ? M - block : kRowBlock;
  return (block * groups + g * rows + panel - block) * each;
}

struct Parameters {
  Vec<float> scale[kParts], minimum[kParts];
};

FW_INLINE Parameters load_parameters(const uint8_t* p) {
  const float16* h = reinterpret_cast<const float16*>(p);
  Parameters out;
  FW_UNROLL
  for (int i = 0; i < kParts; ++i) {
    out.scale[i] = load_as(h + i * kWords);
    out.minimum[i] = load_as(h + kStrip + i * kWords);
  }
  return out;
}

}  // namespace fastweights::quantization::FW_LEVEL
