// Round to nearest: fits the groups of a strip, bundle by bundle, and packs their codes.
#include "core/scratch.h"
#include "quantization/fit.h"

namespace fastweights::quantization::FW_LEVEL {

template <typename Byte>
static void store_row(uint8_t* p, int64_t r, int first, Words v) {
  for (int lane = 0; lane < kWords; ++lane) p[r * kStrip + first + lane] = Byte(v[lane]);
}

static void store_float16_row(uint8_t* p, int64_t r, int first, Floats v) {
  store_as(reinterpret_cast<float16*>(p) + r * kStrip + first, v);
}

// The inverse of six_bits, for all eight.
static void store_six_bits(uint8_t* p, int first, const Words* scales, const Words* minima) {
  for (int j = 0; j < 4; ++j) {
    store_row<uint8_t>(p, j, first, scales[j] | (scales[j + 4] >> 4 << 6));
    store_row<uint8_t>(p, j + 4, first, minima[j] | (minima[j + 4] >> 4 << 6));
    store_row<uint8_t>(p, j + 8, first, (scales[j + 4] & 15) | ((minima[j + 4] & 15) << 4));
  }
}

static void store_float32_row(uint8_t* p, int64_t r, int first, Floats v) {
  store(reinterpret_cast<float*>(p) + r * kStrip + first, v);
}

// What the formats with a choice of parameters store.
static void store_scale_minimum(Parameter kind, const Grid& grid, int first, uint8_t* p) {
  if (kind == Parameter::scale_zero_f32) {
    store_float32_row(p, 0, first, grid.scale);
    store_float32_row(p, 1, first, grid.zero);
  } else {
    store_float16_row(p, 0, first, grid.scale);
    store_float16_row(p, 1, first, kind == Parameter::scale_zero ? grid.zero : grid.minimum);
  }
}

// The parameters of a bundle for the outputs from `first` on; grids may be rounded by it.
template <Format F>
static void store_parameters(const Weight& w, Grid* grids, int first, uint8_t* p) {
  constexpr Parameter kind = kTraits<F>.parameter;
  if constexpr (kind == Parameter::scale_minimum) {
    store_scale_minimum(w.parameter, grids[0], first, p);
  } else if constexpr (kind == Parameter::q4_k) {
    const Shared<F> shared = share<F>(grids);
    store_float16_row(p, 0, first, shared.d);
    store_float16_row(p, 1, first, shared.dmin);
    store_six_bits(p + kLine, first, shared.scales, shared.minima);
  } else if constexpr (kind == Parameter::q6_k) {
    const Shared<F> shared = share<F>(grids);
    store_float16_row(p, 0, first, shared.d);
    for (int j = 0; j < kBundle<F>; ++j) store_row<int8_t>(p + 2 * kStrip, j, first, shared.scales[j]);
  } else {
    for (int j = 0; j < kBundle<F>; ++j) {
      if constexpr (kind == Parameter::scale_f32) {
        store_float32_row(p, 0, first, grids[j].scale);
      } else if constexpr (kind == Parameter::scale_e8m0) {  // exponents above 252 are those of NaN
        store_row<uint8_t>(p, j, first, bit_cast<Words>(grids[j].scale) >> 23);
      } else {
        store_float16_row(p, j, first, grids[j].scale);
      }
    }
  }
}

// out[i][16] = W[16 strip + lane, k + i], zero outside the weight.
template <typename S>
static void load_inputs(const QuantizeArgs& a, int64_t strip, int64_t k, int64_t n, float* out) {
  const S* w = static_cast<const S*>(a.w);
  for (int64_t lane = 0; lane < kStrip; ++lane) {
    const int64_t row = strip * kStrip + lane;
    for (int64_t i = 0; i < n; ++i) {
      out[i * kStrip + lane] = row < a.weight.N ? float(to_compute(w[row * a.w_stride + k + i])) : 0.0f;
    }
  }
}

// n inputs of `rows` outputs, w[i * 16], as a bundle; its bytes are all zeros before.
template <Format F>
static void pack_bundle(const Weight& weight, const float* w, int64_t n, int64_t rows, uint8_t* out) {
  for (int part = 0; part < kParts; ++part) {
    const int first = part * kWords;
    Grid grids[kBundle<F>] = {};
    for (int64_t j = 0; j * weight.group < n; ++j) {
      const int64_t k = j * weight.group, inputs = n - k < weight.group ? n - k : weight.group;
      grids[j] = grid_of<F>({w + k * kStrip + first, inputs}, weight.parameter);
    }
    store_parameters<F>(weight, grids, first, parameters_of<F>(weight, out, 0));
    for (int64_t k = 0; k < n; ++k) {
      const Grid& grid = grids[k / weight.group];
      uint8_t* lines = lines_of<F>(weight, out, k / weight.group);
      const Words code = nearest_code<F>((load(w + k * kStrip + first) - grid.minimum) * grid.inverse);
      for (int lane = 0; lane < kWords && first + lane < rows; ++lane) {
        put_code<F>(lines, first + lane, k % weight.group, code[lane]);
      }
    }
  }
}

using LoadInputs = void (*)(const QuantizeArgs& a, int64_t strip, int64_t k, int64_t n, float* out);

static LoadInputs loader_of(Element element) {
  switch (element) {
    case Element::bf16:
      return &load_inputs<bfloat16>;
    case Element::f16:
      return &load_inputs<float16>;
    case Element::f64:
      return &load_inputs<double>;
    default:
      return &load_inputs<float>;
  }
}

template <Format F>
static void quantize_strips(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const Weight& q = a.weight;
  const int64_t inputs = kBundle<F> * q.group;
  const LoadInputs load_weights = loader_of(a.element);
  Scratch scratch(Scratch::take_bytes<float>(inputs * kStrip));
  float* w = scratch.take<float>(inputs * kStrip);
  for (int64_t strip = begin; strip < end; ++strip) {
    uint8_t* out = a.packed + strip * q.strip_bytes;
    __builtin_memset(out, 0, size_t(q.strip_bytes));
    const int64_t rows = q.N - strip * kStrip < kStrip ? q.N - strip * kStrip : kStrip;
    for (int64_t k = 0; k < q.K; k += inputs, out += q.bundle_bytes) {
      const int64_t n = q.K - k < inputs ? q.K - k : inputs;
      load_weights(a, strip, k, n, w);
      pack_bundle<F>(q, w, n, rows, out);
    }
  }
}

void quantize(const QuantizeArgs& a, int64_t begin, int64_t end) noexcept {
  with_format(a.weight.format, [&]<Format F>(FormatTag<F>) { quantize_strips<F>(a, begin, end); });
}

}  // namespace fastweights::quantization::FW_LEVEL
