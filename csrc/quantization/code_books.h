// The formats whose codes are indexes of 16 fixed levels, and the one step that reads them: a look-up by nibbles.
#pragma once

#include "core/vec.h"
#include "quantization/formats.h"

namespace fastweights::quantization::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

// levels  by code, what the scale multiplies
// image   by code, integers that meet int8 activations: level = image * image_unit, exactly or nearly
// order   codes by level
template <Format F>
struct CodeBook;

// A number above the threshold goes to level order[i + 1] or higher, any other to order[i] or lower.
template <Format F>
constexpr float threshold(int i) {
  using Book = CodeBook<F>;
  return (Book::levels[Book::order[i]] + Book::levels[Book::order[i + 1]]) / 2;
}

// Quantiles of the normal distribution (QLoRA, 2023). The image is off by half a step of 1/127 at most.
template <>
struct CodeBook<Format::nf4> {
  alignas(64) static constexpr float levels[16] = {
      -1.0f,
      -0.6961928009986877f,
      -0.5250730514526367f,
      -0.39491748809814453f,
      -0.28444138169288635f,
      -0.18477343022823334f,
      -0.09105003625154495f,
      0.0f,
      0.07958029955625534f,
      0.16093020141124725f,
      0.24611230194568634f,
      0.33791524171829224f,
      0.44070982933044434f,
      0.5626170039176941f,
      0.7229568362236023f,
      1.0f,
  };
  alignas(16) static constexpr int8_t image[16] = {-127, -88, -67, -50, -36, -23, -12, 0,
                                                   10,   20,  31,  43,  56,  71,  92,  127};
  static constexpr float image_unit = 1.0f / 127;
  static constexpr int order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

// The 4-bit floats of bitsandbytes. All of the image is exact but for the smallest level, 1/192, which becomes 1/96.
template <>
struct CodeBook<Format::fp4> {
  alignas(64) static constexpr float levels[16] = {
      0.0f,
      0.0052083334885537624f,
      0.6666666865348816f,
      1.0f,
      0.3333333432674408f,
      0.5f,
      0.1666666716337204f,
      0.25f,
      0.0f,
      -0.0052083334885537624f,
      -0.6666666865348816f,
      -1.0f,
      -0.3333333432674408f,
      -0.5f,
      -0.1666666716337204f,
      -0.25f,
  };
  alignas(16) static constexpr int8_t image[16] = {0, 1, 64, 96, 32, 48, 16, 24, 0, -1, -64, -96, -32, -48, -16, -24};
  static constexpr float image_unit = 1.0f / 96;
  static constexpr int order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
};

// llama.cpp's integers near the quantiles of the normal distribution.
template <>
struct CodeBook<Format::iq4_nl> {
  alignas(64) static constexpr float levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                   1,    13,   25,  38,  53,  69,  89,  113};
  alignas(16) static constexpr int8_t image[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                   1,    13,   25,  38,  53,  69,  89,  113};
  static constexpr float image_unit = 1.0f;
  static constexpr int order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

// E2M1 of the OCP microscaling formats. Code 8, a second zero, is read and not written.
template <>
struct CodeBook<Format::mxfp4> {
  alignas(64) static constexpr float levels[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  alignas(16) static constexpr int8_t image[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  static constexpr float image_unit = 0.5f;
  static constexpr int order[16] = {15, 14, 13, 12, 11, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7};
};

// Of two levels equally near, the one with an even mantissa: thresholds that go up are a unit in the last place lower.
template <>
constexpr float threshold<Format::mxfp4>(int i) {
  constexpr float thresholds[15] = {
      -0x1.400002p+2f, -3.5f, -0x1.400002p+1f, -1.75f, -0x1.400002p+0f, -0.75f, -0x1.000002p-2f, -0x1.000002p-2f, 0.25f,
      0x1.7ffffep-1f,  1.25f, 0x1.bffffep+0f,  2.5f,   0x1.bffffep+1f,  5.0f};
  return thresholds[i];
}

// levels[n] for the nibble n that begins at `bit` of every word.
FW_INLINE Vec<float> look_up(const float* levels, Vec<int32_t> words, int bit) {
#if defined(__AVX512F__)
  const __m512i index = bit_cast<__m512i>(words >> bit);
  return bit_cast<Vec<float>>(_mm512_permutexvar_ps(index, _mm512_load_ps(levels)));
#elif defined(__AVX2__) && !defined(FW_WIDE)
  const __m256i index = bit_cast<__m256i>(words >> bit);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(levels), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(levels + 8), index);
  return bit_cast<Vec<float>>(_mm256_blendv_ps(low, high, bit_cast<__m256>(words << (28 - bit))));
#else
  Vec<float> out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = levels[(words[i] >> bit) & 15];
  return out;
#endif
}

// image[n] for every byte n < 16.
FW_INLINE Vec<int32_t> look_up_bytes(const int8_t* image, Vec<int32_t> nibbles) {
#if defined(__AVX512BW__)
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(image)));
  return bit_cast<Vec<int32_t>>(_mm512_shuffle_epi8(table, bit_cast<__m512i>(nibbles)));
#elif defined(__AVX2__) && !defined(FW_WIDE)
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(image)));
  return bit_cast<Vec<int32_t>>(_mm256_shuffle_epi8(table, bit_cast<__m256i>(nibbles)));
#elif defined(__aarch64__) && !defined(FW_WIDE)
  return bit_cast<Vec<int32_t>>(vqtbl1q_s8(vld1q_s8(image), bit_cast<uint8x16_t>(nibbles)));
#else
  uint8_t byte[sizeof(nibbles)];
  __builtin_memcpy(byte, &nibbles, sizeof(nibbles));
  for (uint8_t& b : byte) b = uint8_t(image[b]);
  __builtin_memcpy(&nibbles, byte, sizeof(nibbles));
  return nibbles;
#endif
}

}  // namespace fastweights::quantization::FW_LEVEL
