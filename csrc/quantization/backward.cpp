// dx = dy W without W: a task decodes [chunk of K, 64 outputs] panels, as many as there are outputs, and multiplies
// each with the 64 gradients of its rows. The product is formed transposed, dx^T = W^T dy^T, since the packed weight
// comes out with outputs as lanes; rows of dy are transposed once per panel instead.
#include "core/gemm.h"
#include "core/scratch.h"
#include "quantization/line.h"

namespace fastweights::quantization::FW_LEVEL {

constexpr int64_t kOutputs = 4 * kStrip;

// out[k][kOutputs] (16 of its columns) = W^T of group g of one strip.
template <Format F, typename T>
static void decode_group(const Weight& w, const uint8_t* strip, int64_t g, T* out) {
  const Parameters p = load_parameters<F>(w, strip, g);
  const uint8_t* lines = lines_of<F>(w, strip, g);
  using Numbers = typename VecOf<T, kWords>::type;
  using Unaligned = typename VecOf<T, kWords>::unaligned;
  for (int i = 0; i < kParts; ++i) {
    const Numbers minimum = __builtin_convertvector(p.minimum[i], Numbers);
    const uint8_t* run = lines;
    T* to = out + i * kWords;
    for (int64_t k = 0; k < w.group; k += 4 * kRun<F>, run += kRunBytes<F>, to += 4 * kRun<F> * kOutputs) {
      FW_UNROLL
      for (int u = 0; u < kRun<F>; ++u) {
        const Words words = code_words<F>(run, u, i);
        FW_UNROLL
        for (int t = 0; t < 4; ++t) {
          const Numbers scale = __builtin_convertvector(p.scale[i] * level_unit<F>(t), Numbers);
          const Numbers level = __builtin_convertvector(level_at<F>(words, t), Numbers);
          *reinterpret_cast<Unaligned*>(to + (4 * u + t) * kOutputs) = scale * level + minimum;
        }
      }
    }
  }
}

template <typename T>
using Decode = void (*)(const Weight& w, const uint8_t* strip, int64_t g, T* out);

// out[n][columns] = dy[m, n0 + n], zero beyond the rows and outputs that there are.
template <typename S, typename T>
static void transpose_dy(const BackwardArgs& a, int64_t row, int64_t rows, int64_t n0, int64_t columns, T* out) {
  const int64_t outputs = a.weight.N - n0 < kOutputs ? a.weight.N - n0 : kOutputs;
  for (int64_t i = 0; i < kOutputs * columns; ++i) out[i] = 0;
  for (int64_t m = 0; m < rows; ++m) {
    const S* dy = static_cast<const S*>(a.dy) + (row + m) * a.dy_stride + n0;
    for (int64_t n = 0; n < outputs; ++n) out[n * columns + m] = to_compute(dy[n]);
  }
}

template <typename S>
static void run(const BackwardArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const Weight& w = a.weight;
  const auto decode = with_format(w.format, []<Format F>(FormatTag<F>) -> Decode<T> { return &decode_group<F, T>; });
  const int64_t chunk = a.chunk_groups * w.group, widest = (kRowBlock + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  Scratch scratch(Scratch::take_bytes<T>(chunk * kOutputs) + Scratch::take_bytes<T>(chunk * widest) +
                  Scratch::take_bytes<T>(kOutputs * widest));
  T* panel = scratch.take<T>(chunk * kOutputs);
  T* dx = scratch.take<T>(chunk * widest);
  T* dy = scratch.take<T>(kOutputs * widest);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / a.chunks * kRowBlock, g0 = task % a.chunks * a.chunk_groups;
    const int64_t rows = a.M - row < kRowBlock ? a.M - row : kRowBlock;
    const int64_t columns = (rows + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    const int64_t groups = w.groups - g0 < a.chunk_groups ? w.groups - g0 : a.chunk_groups;
    for (int64_t i = 0; i < groups * w.group * columns; ++i) dx[i] = 0;
    for (int64_t strip = 0; strip < w.strips; strip += kOutputs / kStrip) {
      const int64_t strips = w.strips - strip < kOutputs / kStrip ? w.strips - strip : kOutputs / kStrip;
      for (int64_t s = 0; s < strips; ++s) {
        const uint8_t* of_strip = w.packed + (strip + s) * w.strip_bytes;
        for (int64_t g = 0; g < groups; ++g) {
          decode(w, of_strip, g0 + g, panel + g * w.group * kOutputs + s * kStrip);
        }
      }
      transpose_dy<S, T>(a, row, rows, strip * kStrip, columns, dy);
      gemm<T>(groups * w.group, columns, strips * kStrip, panel, kOutputs, 1, dy, columns, dx, columns, true);
    }
    const int64_t k0 = g0 * w.group, k_end = w.K - k0 < groups * w.group ? w.K - k0 : groups * w.group;
    for (int64_t m = 0; m < rows; ++m) {
      S* out = static_cast<S*>(a.dx) + (row + m) * w.K + k0;
      for (int64_t k = 0; k < k_end; ++k) out[k] = from_compute<S>(dx[k * columns + m]);
    }
  }
}

void backward(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  switch (a.element) {
    case Element::f32:
      return run<float>(a, begin, end);
    case Element::bf16:
      return run<bfloat16>(a, begin, end);
    case Element::f16:
      return run<float16>(a, begin, end);
    case Element::f64:
      return run<double>(a, begin, end);
  }
}

}  // namespace fastweights::quantization::FW_LEVEL
