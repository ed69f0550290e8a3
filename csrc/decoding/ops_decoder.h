// One token per row through a whole decoder: plain pointers that were checked before, and the phases.
#pragma once

#include <vector>

#include "decoding/kernel.h"
#include "decoding/ops_team.h"
#include "quantization/ops_activations.h"

namespace fastweights::decoding {

struct Linear {
  quantization::Weight weight;
  const float* bias;  // [N] or null
};

struct Layer {
  Linear q, k, v, o, gate, up, down;
  const float *input_norm, *mlp_norm;  // [width]
  int64_t* position;                   // [rows], counted up
  AttentionArgs attention;             // without what the layers share
};

struct Sizes {
  int64_t rows, width, heads, kv_heads, state_heads, dim, features, intermediate, window;
  int64_t qkv() const { return (heads + 2 * kv_heads) * dim; }
};

struct Settings {
  float scale, norm_eps;
  bool rotated_features, int8_activation;
};

class Decoder {
 public:
  // All layers have the sizes `n`. The decoder keeps references.
  Decoder(const Sizes& n, const Settings& settings, const std::vector<Layer>& layers, const Linear& head,
          const float* final_norm);

  // The angles position * inv_freq in float32, as Hugging Face computes them; cos and sin are multiplied by `factor`.
  void rotary(const int64_t* position, const float* inv_freq, float factor);

  // x [rows, width] goes through the layers, in place; logits [rows, head.N].
  void run(float* x, float* logits);

 private:
  struct Product {
    const Linear& linear;
    float* y;  // rows y_stride apart
    int64_t y_stride;
    bool add;  // to what is in y
  };
  using Member = Team::Member;

  void run_layer(const Layer& layer, float* x, Member& member);
  void attend(const Layer& layer, Member& member);
  void pack(const float* x, int64_t stride, const Linear& linear, const float* norm, bool gated,
            const quantization::PackedActivations& out, Member& member);
  void multiply(const quantization::PackedActivations& x, std::initializer_list<Product> products, Member& member);

  Sizes n_;
  Settings settings_;
  const std::vector<Layer>& layers_;
  const Linear& head_;
  const float* final_norm_;
  std::vector<float> cos_, sin_, qkv_, key_, query_features_, key_features_, normaliser_, heads_, gate_up_;
  quantization::PackedActivations width_rows_, head_rows_, intermediate_rows_, final_rows_;
};

}  // namespace fastweights::decoding
