// The codec of the states as ops of its own: nearest codes of blocks scaled to [-1, 1], and back.
#include "optim/codec.h"
#include "optim/kernel.h"

namespace fastweights::optim::FW_LEVEL {

template <bool kSigned, typename S>
FW_INLINE void quantize_block(const S* x, int64_t size, uint8_t* codes, float* absmax) {
  Ints most = {};
  for_vectors<float>(size, [&](int64_t j, auto part) { most = max(most, magnitude_bits(load_as(x + j, part))); });
  *absmax = bit_cast<float>(reduce_max<int32_t>(most));
  const Floats inverse = set1(inverse_of(*absmax));
  for_vectors<float>(size, [&](int64_t j, auto part) {
    store_bytes(codes + j, code_of<kSigned>(kMap<kSigned>, load_as(x + j, part) * inverse), part);
  });
}

template <bool kSigned, typename S>
FW_INLINE void dequantize_block(S* x, int64_t size, const uint8_t* codes, const float* absmax) {
  const Floats scale = set1(*absmax);
  for_vectors<float>(size, [&](int64_t j, auto part) {
    store_as(x + j, level_of<kSigned>(kMap<kSigned>, load_bytes(codes + j, part, kMap<kSigned>.zero)) * scale, part);
  });
}

// f(first element, how many, block) for the blocks of the tasks.
template <typename F>
FW_INLINE void for_blocks(const CodecArgs& a, int64_t begin, int64_t end, const F& f) {
  const int64_t stop = end * kTaskElements < a.size ? end * kTaskElements : a.size;
  for (int64_t first = begin * kTaskElements; first < stop; first += a.block) {
    f(first, stop - first < a.block ? stop - first : a.block, first / a.block);
  }
}

template <bool kSigned, typename S>
static void quantize_tasks(const CodecArgs& a, int64_t begin, int64_t end) {
  for_blocks(a, begin, end, [&](int64_t first, int64_t size, int64_t block) {
    quantize_block<kSigned>(static_cast<const S*>(a.x) + first, size, a.codes + first, a.absmax + block);
  });
}

template <typename S>
static void quantize_of(const CodecArgs& a, int64_t begin, int64_t end) {
  a.is_signed ? quantize_tasks<true, S>(a, begin, end) : quantize_tasks<false, S>(a, begin, end);
}

void quantize_blockwise(const CodecArgs& a, int64_t begin, int64_t end) noexcept {
  switch (a.element) {
    case Element::bf16:
      return quantize_of<bfloat16>(a, begin, end);
    case Element::f16:
      return quantize_of<float16>(a, begin, end);
    default:
      return quantize_of<float>(a, begin, end);
  }
}

template <bool kSigned>
static void dequantize_tasks(const CodecArgs& a, int64_t begin, int64_t end) {
  for_blocks(a, begin, end, [&](int64_t first, int64_t size, int64_t block) {
    dequantize_block<kSigned>(static_cast<float*>(a.x) + first, size, a.codes + first, a.absmax + block);
  });
}

void dequantize_blockwise(const CodecArgs& a, int64_t begin, int64_t end) noexcept {
  a.is_signed ? dequantize_tasks<true>(a, begin, end) : dequantize_tasks<false>(a, begin, end);
}

}  // namespace fastweights::optim::FW_LEVEL
