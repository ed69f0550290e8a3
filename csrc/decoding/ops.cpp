// decode_step: one token per row through all layers of a linearised, quantized Llama-type decoder, in one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/cpu_level.h"
#include "core/parallel.h"
#include "decoding/kernel.h"
#include "quantization/ops_activations.h"
#include "quantization/ops_weight.h"

namespace fastweights::decoding {
namespace {

namespace q = ::fastweights::quantization;

constexpr const char* kOp = "decode_step";

// How many tensors a layer has in each list, and which.
enum WeightIndex { kQ, kK, kV, kO, kGate, kUp, kDown, kWeights };
enum NormIndex { kInputNorm, kMlpNorm, kQNorm, kKNorm, kNorms };
enum MapIndex { kQMap, kKMap, kMix, kDecay, kSinkWeight, kSinkBias, kMaps };
enum StateIndex { kRingK, kRingV, kRingF, kStateS, kStateZ, kPosition, kStates };

struct Sizes {
  int64_t B, D, HQ, HKV, HF, K, F, I, window;  // HF: heads of the key features; F: features of a head
  int64_t qkv() const { return (HQ + 2 * HKV) * K; }
};

const float* floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, const char* letters) {
  check_cpu(kOp, name, t);
  check_dtype(kOp, name, t, ScalarType::Float, "");
  check_shape(kOp, name, t, sizes, letters, "");
  check(t.is_contiguous(), kOp, "expected ", name, " to be contiguous, got another layout");
  return static_cast<const float*>(t.const_data_ptr());
}

// The same, or null for an empty tensor.
const float* optional_floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                             const char* letters) {
  return t.numel() == 0 ? nullptr : floats(name, t, sizes, letters);
}

// One of several weights that multiply the same rows.
struct Product {
  q::Weight weight;
  const float* bias;
  const float* residual;  // rows as far apart as those of y, or null
  float* y;
  int64_t y_stride;
};

// y = x W^T + bias + residual for every product, in one parallel region.
void multiply(const q::Activations& x, int64_t M, const Product* products, int64_t count) {
  const int64_t blocks = (M + q::kRowBlock - 1) / q::kRowBlock;
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; ++i) tasks += blocks * products[i].weight.strips;
  const double flops = 2.0 * double(std::min(M, q::kRowBlock) * q::kStrip * products[0].weight.K);
  parallel_tasks(tasks, flops, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Product& p = products[i];
      const int64_t own = blocks * p.weight.strips;
      const int64_t b = std::max(begin - first, int64_t(0)), e = std::min(end - first, own);
      first += own;
      if (b >= e) continue;
      q::MatmulArgs args{};
      args.weight = p.weight;
      args.x = x;
      args.M = M;
      args.bias_element = args.element = Element::f32;
      args.bias = p.bias;
      args.residual = p.residual;
      args.residual_stride = args.y_stride = p.y_stride;
      args.y = p.y;
      q::matmul(args, b, e);
    }
  });
}

// What the layers share: sizes, buffers for one token of every row, and settings.
struct Decoder {
  Sizes n;
  double scale;
  float norm_eps;
  bool rotated_features, int8_activation;
  std::string format;
  int64_t group_size;
  std::vector<float> cos, sin, qkv, query, key, query_features, key_features, sink, heads, gate_up;

  Decoder(const Sizes& sizes)
      : n(sizes),
        cos(sizes.B * sizes.K / 2),
        sin(sizes.B * sizes.K / 2),
        qkv(sizes.B * sizes.qkv()),
        query(sizes.B * sizes.HQ * sizes.K),
        key(sizes.B * sizes.HKV * sizes.K),
        query_features(sizes.B * sizes.HQ * sizes.F),
        key_features(sizes.B * sizes.HF * sizes.F),
        sink(sizes.B * sizes.HQ),
        heads(sizes.B * sizes.HQ * sizes.K),
        gate_up(sizes.B * 2 * sizes.I) {}

  q::Weight weight(const Tensor& packed, int64_t out_features, int64_t in_features) const {
    return q::weight_of(kOp, packed, format, out_features, in_features, group_size);
  }

  // Angles position * inv_freq as Hugging Face computes them, in float32.
  void rotary(const int64_t* position, const float* inv_freq, float factor) {
    const int64_t half = n.K / 2;
    for (int64_t b = 0; b < n.B; ++b) {
      for (int64_t i = 0; i < half; ++i) {
        const float angle = float(position[b]) * inv_freq[i];
        cos[b * half + i] = std::cos(angle) * factor;
        sin[b * half + i] = std::sin(angle) * factor;
      }
    }
  }

  void layer(float* x, const Tensor* weights, const Tensor* biases, const Tensor* norms, const Tensor* maps,
             const Tensor* states);
  void attend(const Tensor* norms, const Tensor* maps, const Tensor* states);
};

void Decoder::layer(float* x, const Tensor* weights, const Tensor* biases, const Tensor* norms, const Tensor* maps,
                    const Tensor* states) {
  const int64_t width = n.HQ * n.K;
  const auto bias = [&](int i, int64_t size) {
    return biases ? optional_floats("biases", biases[i], {size}, "[out_features]") : nullptr;
  };
  const auto product = [&](int i, int64_t out, int64_t in, float* y, int64_t stride, const float* residual) {
    return Product{weight(weights[i], out, in), bias(i, out), residual, y, stride};
  };
  const auto packed = [&](const float* rows, const Product& product, const q::Prologue& prologue) {
    const q::Weight& w = product.weight;
    q::PackedActivations out(int8_activation, false, n.B, w);
    q::pack({Element::f32, rows, prologue.gated ? 2 * w.K : w.K, n.B, w.K, w.group, w.groups, prologue, out.view});
    return out;
  };

  const float* input_norm = floats("norms", norms[kInputNorm], {n.D}, "[D]");
  const float* mlp_norm = floats("norms", norms[kMlpNorm], {n.D}, "[D]");
  const Product qkv_products[] = {product(kQ, width, n.D, qkv.data(), n.qkv(), nullptr),
                                  product(kK, n.HKV * n.K, n.D, qkv.data() + width, n.qkv(), nullptr),
                                  product(kV, n.HKV * n.K, n.D, qkv.data() + width + n.HKV * n.K, n.qkv(), nullptr)};
  const Product o = product(kO, n.D, width, x, n.D, x);
  const Product gate_up_products[] = {product(kGate, n.I, n.D, gate_up.data(), 2 * n.I, nullptr),
                                      product(kUp, n.I, n.D, gate_up.data() + n.I, 2 * n.I, nullptr)};
  const Product down = product(kDown, n.D, n.I, x, n.D, x);

  multiply(packed(x, qkv_products[0], {input_norm, norm_eps, false}).view, n.B, qkv_products, 3);
  attend(norms, maps, states);
  multiply(packed(heads.data(), o, {nullptr, 0.0f, false}).view, n.B, &o, 1);
  multiply(packed(x, gate_up_products[0], {mlp_norm, norm_eps, false}).view, n.B, gate_up_products, 2);
  multiply(packed(gate_up.data(), down, {nullptr, 0.0f, true}).view, n.B, &down, 1);
}

void Decoder::attend(const Tensor* norms, const Tensor* maps, const Tensor* states) {
  HeadArgs args{};
  args.heads = n.HQ;
  args.kv_heads = n.HKV;
  args.dim = n.K;
  args.features = n.F / 2;
  args.feature_heads = n.HF;
  args.rotated_features = rotated_features;
  args.qkv = qkv.data();
  args.cos = cos.data();
  args.sin = sin.data();
  args.q_norm = optional_floats("norms", norms[kQNorm], {n.K}, "[K]");
  args.k_norm = optional_floats("norms", norms[kKNorm], {n.K}, "[K]");
  args.norm_eps = norm_eps;
  args.q_map = floats("maps", maps[kQMap], {n.HQ, n.K, n.F / 2}, "[HQ, K, F/2]");
  args.k_map = floats("maps", maps[kKMap], {n.HF, n.K, n.F / 2}, "[HF, K, F/2]");
  args.sink_weight = optional_floats("maps", maps[kSinkWeight], {n.HQ, n.K}, "[HQ, K]");
  args.sink_bias = optional_floats("maps", maps[kSinkBias], {n.HQ}, "[HQ]");
  check((args.sink_weight == nullptr) == (args.sink_bias == nullptr), kOp,
        "expected sink weight and bias or neither in maps, got one");
  args.q = query.data();
  args.k = key.data();
  args.qf = query_features.data();
  args.kf = key_features.data();
  args.sink = sink.data();
  parallel_tasks(n.B * (n.HQ + n.HF), 4.0 * double(n.K * n.F),
                 [&](int64_t begin, int64_t end) { FW_KERNEL(head_inputs)(args, begin, end); });
}

Tensor decode_step(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                   const std::vector<Tensor>& norms, const std::vector<Tensor>& maps,
                   const std::vector<Tensor>& states, const Tensor& final_norm, const Tensor& head,
                   const Tensor& inv_freq, int64_t intermediate, int64_t vocab, int64_t window, bool rotated_features,
                   double rotary_factor, double scale, double norm_eps, const std::string& format, int64_t group_size,
                   const std::string& head_format, int64_t head_group_size, const std::string& activation) {
  check_rank(kOp, "x", x, 2, "[B, D]");
  const int64_t layers = int64_t(weights.size()) / kWeights;
  const auto per_layer = [&](const char* name, const std::vector<Tensor>& list, int64_t count) {
    check(int64_t(list.size()) == layers * count, kOp, "expected ", count, " ", name, " for each of ", layers,
          " layers, got ", list.size());
  };
  check(layers >= 1, kOp, "expected at least one layer, got none");
  per_layer("weights", weights, kWeights);
  if (!biases.empty()) per_layer("biases", biases, kWeights);
  per_layer("norms", norms, kNorms);
  per_layer("maps", maps, kMaps);
  per_layer("states", states, kStates);
  check_rank(kOp, "maps", maps[kQMap], 3, "[HQ, K, F/2]");
  check_rank(kOp, "maps", maps[kKMap], 3, "[HF, K, F/2]");
  check_rank(kOp, "states", states[kRingK], 4, "[B, HKV, window, K]");
  check(activation == "int8" || activation == "float", kOp, "expected activation int8 or float, got '", activation, "'");

  const Tensor& q_map = maps[kQMap];
  const Sizes n{x.size(0),        x.size(1),     q_map.size(0),     states[kRingK].size(1), maps[kKMap].size(0),
                q_map.size(1), 2 * q_map.size(2), intermediate, window};
  check(n.K % 2 == 0 && n.K > 0 && n.F > 0, kOp, "expected an even head size and features, got ", shape_of(q_map));
  check(n.HKV >= 1 && n.HQ % n.HKV == 0, kOp, "expected a number of query heads that is a multiple of ", n.HKV, ", got ", n.HQ);
  check(n.HF == n.HKV || n.HF == n.HQ, kOp, "expected key maps for ", n.HKV, " or ", n.HQ, " heads, got ", n.HF);
  Decoder decoder(n);
  decoder.scale = scale;
  decoder.norm_eps = float(norm_eps);
  decoder.rotated_features = rotated_features;
  decoder.int8_activation = activation == "int8";
  decoder.format = format;
  decoder.group_size = group_size;

  const Tensor& position = states[kPosition];
  check_cpu(kOp, "states", position);
  check_dtype(kOp, "states", position, ScalarType::Long, " (position)");
  check_shape(kOp, "states", position, {n.B}, "[B]", "x");
  decoder.rotary(static_cast<const int64_t*>(position.const_data_ptr()),
                 floats("inv_freq", inv_freq, {n.K / 2}, "[K/2]"), float(rotary_factor));
  const float* source = floats("x", x, {n.B, n.D}, "[B, D]");
  std::vector<float> hidden(source, source + n.B * n.D);
  for (int64_t l = 0; l < layers; ++l) {
    decoder.layer(hidden.data(), &weights[l * kWeights], biases.empty() ? nullptr : &biases[l * kWeights],
                  &norms[l * kNorms], &maps[l * kMaps], &states[l * kStates]);
  }

  Tensor logits = torch::stable::new_empty(x, {n.B, vocab});
  const q::Weight head_weight = q::weight_of(kOp, head, head_format, vocab, n.D, head_group_size);
  const float* norm = floats("final_norm", final_norm, {n.D}, "[D]");
  q::PackedActivations rows(decoder.int8_activation, false, n.B, head_weight);
  q::pack({Element::f32, hidden.data(), n.D, n.B, n.D, head_weight.group, head_weight.groups,
           {norm, float(norm_eps), false}, rows.view});
  const Product product{head_weight, nullptr, nullptr, static_cast<float*>(logits.mutable_data_ptr()), vocab};
  multiply(rows.view, n.B, &product, 1);
  return logits;
}

}  // namespace
}  // namespace fastweights::decoding

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "decode_step(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norms, Tensor[] maps, Tensor(a!)[] states, "
      "Tensor final_norm, Tensor head, Tensor inv_freq, *, int intermediate, int vocab, int window, "
      "bool rotated_features, float rotary_factor, float scale, float norm_eps, str format, int group_size, "
      "str head_format, int head_group_size, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&fastweights::decoding::decode_step));
}
