// decode_step: one token per row through all layers of a linearised, quantized Llama-type decoder, in one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "core/check.h"
#include "decoding/ops_decoder.h"
#include "quantization/ops_weight.h"

namespace fastweights::decoding {
namespace {

constexpr const char* kOp = "decode_step";

// How many tensors a layer has in each list, and which.
enum WeightIndex { kQ, kK, kV, kO, kGate, kUp, kDown, kWeights };
enum NormIndex { kInputNorm, kMlpNorm, kQNorm, kKNorm, kNorms };
enum MapIndex { kQMap, kKMap, kMix, kDecay, kSink, kQGain, kKGain, kMaps };
enum StateIndex { kRingK, kRingV, kRingF, kStateS, kStateZ, kPosition, kStates };

// Copies of tensors that came with other strides; they live as long as the call.
using Copies = std::vector<Tensor>;

const Tensor& in_order(const Tensor& t, Copies& copies) {
  if (t.is_contiguous()) return t;
  copies.push_back(torch::stable::contiguous(t));
  return copies.back();
}

void check_floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, const char* letters) {
  check_cpu(kOp, name, t);
  check_dtype(kOp, name, t, ScalarType::Float, "");
  check_shape(kOp, name, t, sizes, letters, "");
}

const float* floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, const char* letters,
                    Copies& copies) {
  check_floats(name, t, sizes, letters);
  return static_cast<const float*>(in_order(t, copies).const_data_ptr());
}

// The same, or null for an empty tensor.
const float* optional_floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                             const char* letters, Copies& copies) {
  return t.numel() == 0 ? nullptr : floats(name, t, sizes, letters, copies);
}

float* mutable_floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, const char* letters) {
  check_floats(name, t, sizes, letters);
  check(t.is_contiguous(), kOp, "expected ", name, " to be contiguous, got another layout");
  return static_cast<float*>(t.mutable_data_ptr());
}

int64_t* positions(const Tensor& t, int64_t rows) {
  check_cpu(kOp, "states", t);
  check_dtype(kOp, "states", t, ScalarType::Long, " (position)");
  check_shape(kOp, "states", t, {rows}, "[B]", "x");
  check(t.is_contiguous(), kOp, "expected states to be contiguous, got another layout");
  int64_t* p = static_cast<int64_t*>(t.mutable_data_ptr());
  for (int64_t b = 0; b < rows; ++b) {
    check(p[b] >= 0 && p[b] < int64_t(1) << 48, kOp, "expected states with 0 <= position < 2^48, got ", p[b]);
  }
  return p;
}

struct Format {
  const std::string& name;
  int64_t group_size;
};

Linear linear(const Tensor& packed, const Tensor* bias, const Format& format, int64_t out, int64_t in, Copies& copies) {
  return {quantization::weight_of(kOp, in_order(packed, copies), format.name, out, in, format.group_size),
          bias ? optional_floats("biases", *bias, {out}, "[out_features]", copies) : nullptr};
}

// Pointers to the tensors of one layer, each checked.
Layer layer_of(const Sizes& n, const Format& format, const Tensor* weights, const Tensor* biases, const Tensor* norms,
               const Tensor* maps, const Tensor* states, Copies& copies) {
  const int64_t heads = n.heads * n.dim, kv_heads = n.kv_heads * n.dim;
  const auto projection = [&](int i, int64_t out, int64_t in) {
    return linear(weights[i], biases ? &biases[i] : nullptr, format, out, in, copies);
  };
  Layer layer{projection(kQ, heads, n.width),
              projection(kK, kv_heads, n.width),
              projection(kV, kv_heads, n.width),
              projection(kO, n.width, heads),
              projection(kGate, n.intermediate, n.width),
              projection(kUp, n.intermediate, n.width),
              projection(kDown, n.width, n.intermediate),
              floats("norms", norms[kInputNorm], {n.width}, "[D]", copies),
              floats("norms", norms[kMlpNorm], {n.width}, "[D]", copies),
              positions(states[kPosition], n.rows),
              {}};
  AttentionArgs& a = layer.attention;
  a.q_norm = optional_floats("norms", norms[kQNorm], {n.dim}, "[K]", copies);
  a.k_norm = optional_floats("norms", norms[kKNorm], {n.dim}, "[K]", copies);
  a.q_map = floats("maps", maps[kQMap], {n.heads, n.dim, n.features / 2}, "[HQ, K, F/2]", copies);
  a.k_map = floats("maps", maps[kKMap], {n.state_heads, n.dim, n.features / 2}, "[HS, K, F/2]", copies);
  a.mix = floats("maps", maps[kMix], {n.heads}, "[HQ]", copies);
  a.decay = optional_floats("maps", maps[kDecay], {n.state_heads, n.features}, "[HS, F]", copies);
  a.sink = optional_floats("maps", maps[kSink], {n.heads, n.dim + 1}, "[HQ, K + 1]", copies);
  a.q_gain = optional_floats("maps", maps[kQGain], {n.heads, n.dim + 1}, "[HQ, K + 1]", copies);
  a.k_gain = optional_floats("maps", maps[kKGain], {n.state_heads, n.dim + 1}, "[HS, K + 1]", copies);
  a.k_ring = mutable_floats("states", states[kRingK], {n.rows, n.kv_heads, n.window, n.dim}, "[B, HKV, w, K]");
  a.v_ring = mutable_floats("states", states[kRingV], {n.rows, n.kv_heads, n.window, n.dim}, "[B, HKV, w, K]");
  a.kf_ring = mutable_floats("states", states[kRingF], {n.rows, n.state_heads, n.window, n.features}, "[B, HS, w, F]");
  a.S = mutable_floats("states", states[kStateS], {n.rows, n.state_heads, n.features, n.dim}, "[B, HS, F, K]");
  a.z = mutable_floats("states", states[kStateZ], {n.rows, n.state_heads, n.features}, "[B, HS, F]");
  return layer;
}

Tensor decode_step(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                   const std::vector<Tensor>& norms, const std::vector<Tensor>& maps, const std::vector<Tensor>& states,
                   const Tensor& final_norm, const Tensor& head, const Tensor& inv_freq, int64_t intermediate,
                   int64_t vocab, bool rotated_features, double rotary_factor, double scale, double norm_eps,
                   const std::string& format, int64_t group_size, const std::string& head_format,
                   int64_t head_group_size, const std::string& activation) {
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
  check_rank(kOp, "maps", maps[kKMap], 3, "[HS, K, F/2]");
  check_rank(kOp, "states", states[kRingK], 4, "[B, HKV, window, K]");
  check(activation == "int8" || activation == "float", kOp, "expected activation int8 or float, got '", activation,
        "'");
  const Tensor &map = maps[kQMap], &ring = states[kRingK];
  const Sizes n{x.size(0),   x.size(1),       map.size(0),  ring.size(1), maps[kKMap].size(0),
                map.size(1), 2 * map.size(2), intermediate, ring.size(2)};
  check(n.dim > 0 && n.dim % 2 == 0 && n.features > 0, kOp, "expected maps of an even K and F >= 2, got ",
        shape_of(map));
  check(n.kv_heads > 0 && n.heads % n.kv_heads == 0, kOp,
        "expected states with a number of kv heads that divides HQ = ", n.heads, " (from maps), got ", n.kv_heads);
  check(n.state_heads == n.kv_heads || n.state_heads == n.heads, kOp, "expected maps of keys for HKV = ", n.kv_heads,
        " or HQ = ", n.heads, " heads, got ", n.state_heads);
  check(n.window > 0, kOp, "expected states with a window of at least 1, got ", n.window);

  Copies copies;
  std::vector<Layer> stack;
  for (int64_t l = 0; l < layers; ++l) {
    stack.push_back(layer_of(n, {format, group_size}, &weights[size_t(l * kWeights)],
                             biases.empty() ? nullptr : &biases[size_t(l * kWeights)], &norms[size_t(l * kNorms)],
                             &maps[size_t(l * kMaps)], &states[size_t(l * kStates)], copies));
  }
  const Linear output = linear(head, nullptr, {head_format, head_group_size}, vocab, n.width, copies);
  const Settings settings{float(scale), float(norm_eps), rotated_features, activation == "int8"};
  const float* norm = floats("final_norm", final_norm, {n.width}, "[D]", copies);
  const float* frequencies = floats("inv_freq", inv_freq, {n.dim / 2}, "[K/2]", copies);
  const float* source = floats("x", x, {n.rows, n.width}, "[B, D]", copies);
  Tensor logits = torch::stable::new_empty(x, {n.rows, vocab});
  if (n.rows == 0) return logits;

  std::vector<float> hidden(source, source + n.rows * n.width);
  Decoder decoder(n, settings, stack, output, norm);
  decoder.rotary(stack[0].position, frequencies, float(rotary_factor));
  decoder.run(hidden.data(), static_cast<float*>(logits.mutable_data_ptr()));
  return logits;
}

}  // namespace
}  // namespace fastweights::decoding

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "decode_step(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norms, Tensor[] maps, Tensor(a!)[] states, "
      "Tensor final_norm, Tensor head, Tensor inv_freq, *, int intermediate, int vocab, "
      "bool rotated_features, float rotary_factor, float scale, float norm_eps, str format, int group_size, "
      "str head_format, int head_group_size, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&fastweights::decoding::decode_step));
}
