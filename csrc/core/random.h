// Random bits from a counter: the same for an element at any number of threads, any level and any vector width.
#pragma once

#include "core/vec.h"

namespace fastweights::FW_LEVEL {

// SplitMix64's finaliser (Steele et al. 2014).
FW_INLINE uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// 32 random bits per lane for the counters first, first + 1, ...: an integer hash (Wellons' lowbias32) whose two halves
// are keyed.
FW_INLINE Vec<uint32_t> random_bits(uint64_t key, int64_t first) {
  Vec<uint32_t> x;
  for (int i = 0; i < kLanes<uint32_t>; ++i) x[i] = uint32_t(i);
  x = (x + uint32_t(first)) ^ uint32_t(key);
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15) ^ uint32_t(key >> 32)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

}  // namespace fastweights::FW_LEVEL
