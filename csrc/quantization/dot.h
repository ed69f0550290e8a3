// Four products of bytes per output, added to a 32-bit accumulator: the one step of the integer matmul that each
// instruction set spells its own way. All spellings give the same integers.
//   start(sum)      an accumulator for one block of kBlock inputs; sum = sum of the block's activation codes
//   dot(acc, w, x)  += the four products of w's bytes with the bytes of x (the same four for all outputs)
//   finish(acc)     the block's int32 sums
// The bytes of w are codes below 16 (nibbles), codes below 64 (counts) or signed numbers.
#pragma once

#include "quantization/line.h"

namespace fastweights::quantization::FW_LEVEL {

using Shorts = Vec<int16_t>;

// acc + a0 * b0 + a1 * b1 on the two int16 halves of every word.
FW_INLINE Words add_pairs(Words acc, Shorts a, Shorts b) {
#if defined(__AVX512BW__)
  return acc + bit_cast<Words>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__) && !defined(FW_WIDE)
  return acc + bit_cast<Words>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__) && !defined(FW_WIDE)
  return acc + bit_cast<Words>(_mm_madd_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  const Words x = bit_cast<Words>(a), y = bit_cast<Words>(b);
  return acc + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// Signed bytes 0 and 2, 1 and 3 of every word as int16.
FW_INLINE Shorts even_bytes(Words w) {
  return (bit_cast<Shorts>(w) << 8) >> 8;
}
FW_INLINE Shorts odd_bytes(Words w) {
  return bit_cast<Shorts>(w) >> 8;
}

enum class Bytes { nibbles, counts, signed_numbers };

template <Format F>
constexpr Bytes kBytes = kTraits<F>.levels != Levels::counted ? Bytes::signed_numbers
                         : kTraits<F>.bits <= 4               ? Bytes::nibbles
                                                              : Bytes::counts;

template <Bytes B>
struct Dot {
  FW_INLINE Words start(int32_t) { return zero<int32_t>(); }
  FW_INLINE Words dot(Words acc, Words w, Words x) {
    return add_pairs(add_pairs(acc, even_bytes(w), even_bytes(x)), odd_bytes(w), odd_bytes(x));
  }
  FW_INLINE Words finish(Words acc) { return acc; }
};

#if defined(__AVX512VNNI__)

template <>
struct Dot<Bytes::nibbles> {
  FW_INLINE Words start(int32_t) { return zero<int32_t>(); }
  FW_INLINE Words dot(Words acc, Words w, Words x) {
    return bit_cast<Words>(_mm512_dpbusd_epi32(bit_cast<__m512i>(acc), bit_cast<__m512i>(w), bit_cast<__m512i>(x)));
  }
  FW_INLINE Words finish(Words acc) { return acc; }
};

template <>
struct Dot<Bytes::counts> : Dot<Bytes::nibbles> {};

// The instruction wants one side unsigned: codes + 128, taken back as 128 times the sum of the activations.
template <>
struct Dot<Bytes::signed_numbers> {
  FW_INLINE Words start(int32_t sum) { return set1(-128 * sum); }
  FW_INLINE Words dot(Words acc, Words w, Words x) {
    return Dot<Bytes::nibbles>::dot(acc, w ^ set1(int32_t(0x80808080)), x);
  }
  FW_INLINE Words finish(Words acc) { return acc; }
};

#elif defined(__AVX2__) && !defined(__AVX512BW__) && !defined(FW_WIDE)

// Codes of 4 bits stay in int16 for a whole block: 8 additions of at most 2 * 15 * 127 are 30480 < 32768.
template <>
struct Dot<Bytes::nibbles> {
  static_assert(kBlock / 4 * 2 * 15 * 127 < 32768);
  FW_INLINE Words start(int32_t) { return zero<int32_t>(); }
  FW_INLINE Words dot(Words acc, Words w, Words x) {
    const __m256i pairs = _mm256_maddubs_epi16(bit_cast<__m256i>(w), bit_cast<__m256i>(x));
    return bit_cast<Words>(_mm256_add_epi16(bit_cast<__m256i>(acc), pairs));
  }
  FW_INLINE Words finish(Words acc) {
    return bit_cast<Words>(_mm256_madd_epi16(bit_cast<__m256i>(acc), _mm256_set1_epi16(1)));
  }
};

template <>
struct Dot<Bytes::counts> {
  FW_INLINE Words start(int32_t) { return zero<int32_t>(); }
  FW_INLINE Words dot(Words acc, Words w, Words x) {
    const __m256i pairs = _mm256_maddubs_epi16(bit_cast<__m256i>(w), bit_cast<__m256i>(x));
    return acc + bit_cast<Words>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  FW_INLINE Words finish(Words acc) { return acc; }
};

// |w| times x with the sign of w: a pair is at most 2 * 128 * 127 = 32512, as |-128| is 128 unsigned and activations
// avoid -128.
template <>
struct Dot<Bytes::signed_numbers> {
  FW_INLINE Words start(int32_t) { return zero<int32_t>(); }
  FW_INLINE Words dot(Words acc, Words w, Words x) {
    const __m256i b = bit_cast<__m256i>(w);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(bit_cast<__m256i>(x), b));
    return acc + bit_cast<Words>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  FW_INLINE Words finish(Words acc) { return acc; }
};

#endif

}  // namespace fastweights::quantization::FW_LEVEL
