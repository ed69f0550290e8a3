// Tables of eight floats that live in a register, and vectors of bytes: the steps of the codec that each instruction
// set spells its own way.
#pragma once

#include "core/tail.h"
#include "core/vec.h"

namespace fastweights::optim::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

using Floats = Vec<float>;
using Ints = Vec<int32_t>;
constexpr int kFloats = kLanes<float>;

// Twice in a row, so that it fills the widest register.
struct Table {
  alignas(64) float entries[16];
};

// entries[index % 8] for every lane.
FW_INLINE Floats pick(const Table& t, Ints index) {
#if defined(__AVX512F__)
  return bit_cast<Floats>(_mm512_permutexvar_ps(bit_cast<__m512i>(index), _mm512_load_ps(t.entries)));
#elif defined(__AVX2__) && !defined(FW_WIDE)
  return bit_cast<Floats>(_mm256_permutevar8x32_ps(_mm256_load_ps(t.entries), bit_cast<__m256i>(index)));
#else
  Floats v;
  for (int i = 0; i < kFloats; ++i) v[i] = t.entries[index[i] & 7];
  return v;
#endif
}

FW_INLINE Ints load_bytes(const uint8_t* p, Whole) {
#if defined(__AVX512F__)
  return bit_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && !defined(FW_WIDE)
  return bit_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Ints v;
  for (int i = 0; i < kFloats; ++i) v[i] = p[i];
  return v;
#endif
}

// v in 0..255.
FW_INLINE void store_bytes(uint8_t* p, Ints v, Whole) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(bit_cast<__m512i>(v)));
#elif defined(__AVX2__) && !defined(FW_WIDE)
  const __m256i w = bit_cast<__m256i>(v);
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(shorts, shorts));
#else
  for (int i = 0; i < kFloats; ++i) p[i] = uint8_t(v[i]);
#endif
}

// The first n bytes; the other lanes hold `rest`.
FW_INLINE Ints load_bytes(const uint8_t* p, int64_t n, uint8_t rest) {
  uint8_t lanes[kFloats];
  __builtin_memset(lanes, rest, sizeof lanes);
  __builtin_memcpy(lanes, p, size_t(n));
  return load_bytes(lanes, Whole{});
}
FW_INLINE Ints load_bytes(const uint8_t* p, Whole whole, uint8_t) {
  return load_bytes(p, whole);
}

FW_INLINE void store_bytes(uint8_t* p, Ints v, int64_t n) {
  uint8_t lanes[kFloats];
  store_bytes(lanes, v, Whole{});
  __builtin_memcpy(p, lanes, size_t(n));
}

}  // namespace fastweights::optim::FW_LEVEL
