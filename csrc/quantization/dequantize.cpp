// W = scale * code + minimum: of all rows, or of the rows that an embedding looks up.
#include "quantization/line.h"

namespace fastweights::quantization::FW_LEVEL {

template <Format F>
FW_INLINE float code_of(const uint8_t* group, int64_t lane, int64_t k) {
  const uint8_t byte = group[k / kLineInputs<F> * kLine + lane * 4 + k % 4];
  if constexpr (F == Format::int4) {
    return float(k / 4 % 2 ? byte >> 4 : byte & 15);
  } else {
    return float(int8_t(byte));
  }
}

template <Format F, typename S>
static void dequantize_row(const Weight& w, int64_t n, S* out) {
  const uint8_t* group = w.packed + n / kStrip * w.strip_bytes;
  const int64_t lane = n % kStrip;
  for (int64_t k0 = 0; k0 < w.K; k0 += w.group, group += w.group_bytes) {
    const float16* parameters = reinterpret_cast<const float16*>(group + w.group_bytes - kLine);
    const float scale = to_compute(parameters[lane]), minimum = to_compute(parameters[kStrip + lane]);
    const int64_t end = w.K - k0 < w.group ? w.K - k0 : w.group;
    for (int64_t k = 0; k < end; ++k) {
      out[k0 + k] = from_compute<S>(Compute<S>(fma(scale, code_of<F>(group, lane, k), minimum)));
    }
  }
}

template <typename S>
static void rows(const DequantizeArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = a.index ? a.index[i] : i;
    S* out = static_cast<S*>(a.out) + i * a.weight.K;
    a.weight.format == Format::int4 ? dequantize_row<Format::int4>(a.weight, n, out)
                                    : dequantize_row<Format::int8>(a.weight, n, out);
  }
}

void dequantize(const DequantizeArgs& a, int64_t begin, int64_t end) noexcept {
  begin *= kStrip;
  end = end * kStrip < a.rows ? end * kStrip : a.rows;
  switch (a.element) {
    case Element::f32:
      return rows<float>(a, begin, end);
    case Element::bf16:
      return rows<bfloat16>(a, begin, end);
    case Element::f16:
      return rows<float16>(a, begin, end);
    case Element::f64:
      return rows<double>(a, begin, end);
  }
}

}  // namespace fastweights::quantization::FW_LEVEL
