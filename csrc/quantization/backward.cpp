// dx = dy W without W: a task decodes [chunk of K, 64 outputs] panels, as many as there are outputs, and multiplies
// each with the gradients of its rows. The product is formed transposed, dx^T = W^T dy^T, since the packed weight
// comes out with outputs as lanes; dy is transposed once instead.
#include "quantization/backward.h"
#include "core/element.h"
#include "core/gemm.h"
#include "core/scratch.h"

namespace fastweights::quantization::FW_LEVEL {

constexpr int64_t kOutputs = kBackwardOutputs;  // of a panel

// out[k][kOutputs] (16 of its columns) = W^T of inputs [begin, end) of a group of one strip, whole runs.
template <Format F, typename T>
static void decode_group(const Weight& w, const uint8_t* strip, int64_t g, int64_t begin, int64_t end, T* out) {
  const Parameters p = load_parameters<F>(w, strip, g);
  const uint8_t* lines = lines_of<F>(w, strip, g) + begin / 4 / kRun<F> * kRunBytes<F>;
  using Numbers = typename VecOf<T, kWords>::type;
  using Unaligned = typename VecOf<T, kWords>::unaligned;
  for (int i = 0; i < kParts; ++i) {
    const Numbers minimum = __builtin_convertvector(p.minimum[i], Numbers);
    const uint8_t* run = lines;
    T* to = out + i * kWords;
    for (int64_t k = begin; k < end; k += 4 * kRun<F>, run += kRunBytes<F>, to += 4 * kRun<F> * kOutputs) {
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

// The same of inputs [begin, end) of the weight.
template <Format F, typename T>
static void decode_inputs(const Weight& w, const uint8_t* strip, int64_t begin, int64_t end, T* out) {
  for_groups(w, begin, end, [&](int64_t g, int64_t from, int64_t to) {
    decode_group<F, T>(w, strip, g, from, to, out + (g * w.group + from - begin) * kOutputs);
  });
}

template <typename T>
using Decode = void (*)(const Weight& w, const uint8_t* strip, int64_t begin, int64_t end, T* out);

// Where its [16 strips][columns] gradients are; all blocks before it are whole.
template <typename T>
static T* transposed_rows(const BackwardArgs& a, const Rows& rows) {
  return static_cast<T*>(a.transposed) + rows.first * a.weight.strips * kStrip;
}

template <typename S>
static void transpose(const BackwardArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const Weight& w = a.weight;
  for (int64_t task = begin; task < end; ++task) {
    const Rows rows = rows_of(a, kLanes<T>, task / a.panels);
    const int64_t n0 = task % a.panels * kOutputs, padded = w.strips * kStrip - n0;
    const int64_t outputs = padded < kOutputs ? padded : kOutputs, real = w.N - n0 < outputs ? w.N - n0 : outputs;
    T* out = transposed_rows<T>(a, rows) + n0 * rows.columns;
    for (int64_t i = 0; i < outputs * rows.columns; ++i) out[i] = 0;
    for (int64_t m = 0; m < rows.count; ++m) {
      const S* dy = static_cast<const S*>(a.dy) + (rows.first + m) * a.dy_stride + n0;
      for (int64_t n = 0; n < real; ++n) out[n * rows.columns + m] = to_compute(dy[n]);
    }
  }
}

template <typename S>
static void run(const BackwardArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const Weight& w = a.weight;
  const auto decode = with_format(w.format, []<Format F>(FormatTag<F>) -> Decode<T> { return &decode_inputs<F, T>; });
  Scratch scratch(Scratch::take_bytes<T>(kBackwardInputs * kOutputs) +
                  Scratch::take_bytes<T>(kBackwardInputs * kBackwardRows));
  T* panel = scratch.take<T>(kBackwardInputs * kOutputs);
  T* dx = scratch.take<T>(kBackwardInputs * kBackwardRows);
  for (int64_t task = begin; task < end; ++task) {
    const Rows rows = rows_of(a, kLanes<T>, task / a.chunks);
    const T* dy = transposed_rows<T>(a, rows);
    const Inputs inputs = inputs_of(a, task % a.chunks);
    for (int64_t i = 0; i < inputs.padded * rows.columns; ++i) dx[i] = 0;
    for (int64_t strip = 0; strip < w.strips; strip += kOutputs / kStrip) {
      const int64_t strips = w.strips - strip < kOutputs / kStrip ? w.strips - strip : kOutputs / kStrip;
      for (int64_t s = 0; s < strips; ++s) {
        decode(w, w.packed + (strip + s) * w.strip_bytes, inputs.first, inputs.first + inputs.padded,
               panel + s * kStrip);
      }
      gemm<T>(inputs.padded, rows.columns, strips * kStrip, panel, kOutputs, 1, dy + strip * kStrip * rows.columns,
              rows.columns, dx, rows.columns, true);
    }
    for (int64_t m = 0; m < rows.count; ++m) {
      S* out = static_cast<S*>(a.dx) + (rows.first + m) * w.K + inputs.first;
      for (int64_t k = 0; k < inputs.count; ++k) out[k] = from_compute<S>(dx[k * rows.columns + m]);
    }
  }
}

void transpose_dy(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.element, [&]<typename S>(S) { transpose<S>(a, begin, end); });
}

void backward(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.element, [&]<typename S>(S) { run<S>(a, begin, end); });
}

}  // namespace fastweights::quantization::FW_LEVEL
