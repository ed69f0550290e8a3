// W = scale * level + minimum: of all rows, or of the rows that an embedding looks up.
#include "core/element.h"
#include "quantization/line.h"

namespace fastweights::quantization::FW_LEVEL {

template <Format F, typename S>
static void dequantize_row(const Weight& w, int64_t n, S* out) {
  using T = Compute<S>;
  const uint8_t* strip = w.packed + n / kStrip * w.strip_bytes;
  const int64_t lane = n % kStrip, part = lane / kWords, element = lane % kWords;
  for (int64_t g = 0; g < w.groups; ++g) {
    const Parameters p = load_parameters<F>(w, strip, g);
    const T scale = T(p.scale[part][element]), minimum = kTraits<F>.offset ? T(0) : T(p.minimum[part][element]);
    const uint8_t* lines = lines_of<F>(w, strip, g);
    const int64_t k0 = g * w.group, end = w.K - k0 < w.group ? w.K - k0 : w.group;
    for (int64_t k = 0; k < end; ++k) {
      out[k0 + k] = from_compute<S>(fma(scale, T(level_of<F>(code_of<F>(lines, lane, k))), minimum));
    }
  }
}

template <typename S>
static void rows(const DequantizeArgs& a, int64_t begin, int64_t end) {
  with_format(a.weight.format, [&]<Format F>(FormatTag<F>) {
    for (int64_t i = begin; i < end; ++i) {
      dequantize_row<F>(a.weight, a.index ? a.index[i] : i, static_cast<S*>(a.out) + i * a.weight.K);
    }
  });
}

void dequantize(const DequantizeArgs& a, int64_t begin, int64_t end) noexcept {
  begin *= kStrip;
  end = end * kStrip < a.rows ? end * kStrip : a.rows;
  with_element(a.element, [&]<typename S>(S) { rows<S>(a, begin, end); });
}

}  // namespace fastweights::quantization::FW_LEVEL
