#include "decoding/ops_decoder.h"

#include <cmath>

#include "core/cpu_level.h"

namespace fastweights::decoding {

namespace q = ::fastweights::quantization;

namespace {

constexpr int64_t kPhasesPerLayer = 11, kPhasesOfHead = 2;

// Tasks that a member claims at a time: enough claims for an even end, not so many that members contend for them.
int64_t grain_of(int64_t tasks) {
  return std::max<int64_t>(1, tasks / (4 * int64_t(torch::stable::get_num_threads())));
}

q::PackedActivations rows_for(const Sizes& n, const Settings& s, const Linear& linear) {
  return q::PackedActivations(s.int8_activation, false, n.rows, linear.weight);
}

}  // namespace

Decoder::Decoder(const Sizes& n, const Settings& settings, const std::vector<Layer>& layers, const Linear& head,
                 const float* final_norm)
    : n_(n),
      settings_(settings),
      layers_(layers),
      head_(head),
      final_norm_(final_norm),
      cos_(size_t(n.rows * n.dim / 2)),
      sin_(size_t(n.rows * n.dim / 2)),
      qkv_(size_t(n.rows * n.qkv())),
      key_(size_t(n.rows * n.kv_heads * n.dim)),
      query_features_(size_t(n.rows * n.heads * n.features)),
      key_features_(size_t(n.rows * n.state_heads * n.features)),
      normaliser_(size_t(n.rows * n.heads)),
      heads_(size_t(n.rows * n.heads * n.dim)),
      gate_up_(size_t(n.rows * 2 * n.intermediate)),
      width_rows_(rows_for(n, settings, layers[0].q)),
      head_rows_(rows_for(n, settings, layers[0].o)),
      intermediate_rows_(rows_for(n, settings, layers[0].down)),
      final_rows_(rows_for(n, settings, head)) {}

void Decoder::rotary(const int64_t* position, const float* inv_freq, float factor) {
  const int64_t half = n_.dim / 2;
  for (int64_t b = 0; b < n_.rows; ++b) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = float(position[b]) * inv_freq[i];
      cos_[size_t(b * half + i)] = std::cos(angle) * factor;
      sin_[size_t(b * half + i)] = std::sin(angle) * factor;
    }
  }
}

void Decoder::run(float* x, float* logits) {
  Team team(int64_t(layers_.size()) * kPhasesPerLayer + kPhasesOfHead);
  team.enter(torch::stable::get_num_threads(), [&](Member& member) {
    for (const Layer& layer : layers_) run_layer(layer, x, member);
    pack(x, n_.width, head_, final_norm_, false, final_rows_, member);
    multiply(final_rows_, {{head_, logits, head_.weight.N, false}}, member);
  });
}

void Decoder::run_layer(const Layer& layer, float* x, Member& member) {
  const int64_t heads = n_.heads * n_.dim, kv_heads = n_.kv_heads * n_.dim, I = n_.intermediate;
  float *query = qkv_.data(), *key = query + heads, *value = key + kv_heads;
  pack(x, n_.width, layer.q, layer.input_norm, false, width_rows_, member);
  multiply(width_rows_,
           {{layer.q, query, n_.qkv(), false}, {layer.k, key, n_.qkv(), false}, {layer.v, value, n_.qkv(), false}},
           member);

  attend(layer, member);
  pack(heads_.data(), heads, layer.o, nullptr, false, head_rows_, member);
  multiply(head_rows_, {{layer.o, x, n_.width, true}}, member);
  pack(x, n_.width, layer.gate, layer.mlp_norm, false, width_rows_, member);
  multiply(width_rows_, {{layer.gate, gate_up_.data(), 2 * I, false}, {layer.up, gate_up_.data() + I, 2 * I, false}},
           member);
  pack(gate_up_.data(), 2 * I, layer.down, nullptr, true, intermediate_rows_, member);
  multiply(intermediate_rows_, {{layer.down, x, n_.width, true}}, member);
}

void Decoder::attend(const Layer& layer, Member& member) {
  AttentionArgs args = layer.attention;
  args.heads = n_.heads;
  args.kv_heads = n_.kv_heads;
  args.state_heads = n_.state_heads;
  args.dim = n_.dim;
  args.features = n_.features;
  args.window = n_.window;
  args.rotated_features = settings_.rotated_features;
  args.scale = settings_.scale;
  args.norm_eps = settings_.norm_eps;
  args.qkv = qkv_.data();
  args.cos = cos_.data();
  args.sin = sin_.data();
  args.position = layer.position;
  args.k = key_.data();
  args.qf = query_features_.data();
  args.kf = key_features_.data();
  args.o = heads_.data();
  args.normaliser = normaliser_.data();
  const int64_t blocks = (n_.dim + kColumns - 1) / kColumns;
  member.run(n_.rows * (n_.heads + n_.state_heads), 1,
             [&](int64_t begin, int64_t end) { FW_KERNEL(read_window)(args, begin, end); });
  member.run(n_.rows * n_.state_heads * blocks, 1,
             [&](int64_t begin, int64_t end) { FW_KERNEL(read_state)(args, begin, end); });
  member.run(n_.rows, n_.rows, [&](int64_t begin, int64_t end) {
    FW_KERNEL(remember)(args, begin, end);
    for (int64_t b = begin; b < end; ++b) ++layer.position[b];
  });
}

void Decoder::pack(const float* x, int64_t stride, const Linear& linear, const float* norm, bool gated,
                   const q::PackedActivations& out, Member& member) {
  const q::Weight& w = linear.weight;
  const q::ActivationArgs args{
      Element::f32, x, stride, n_.rows, w.K, w.group, w.groups, {norm, settings_.norm_eps, gated}, out.view};
  member.run((n_.rows + q::kSourceRows - 1) / q::kSourceRows, 1,
             [&](int64_t begin, int64_t end) { q::pack(args, begin, end); });
}

void Decoder::multiply(const q::PackedActivations& x, std::initializer_list<Product> products, Member& member) {
  const int64_t blocks = (n_.rows + q::kRowBlock - 1) / q::kRowBlock;
  int64_t tasks = 0;
  for (const Product& p : products) tasks += blocks * p.linear.weight.strips;
  member.run(tasks, grain_of(tasks), [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Product& p : products) {
      const int64_t own = blocks * p.linear.weight.strips;
      const int64_t b = std::max<int64_t>(begin - first, 0), e = std::min(end - first, own);
      first += own;
      if (b >= e) continue;
      q::MatmulArgs args{};
      args.weight = p.linear.weight;
      args.x = x.view;
      args.M = n_.rows;
      args.bias_element = args.element = Element::f32;
      args.bias = p.linear.bias;
      args.residual = p.add ? p.y : nullptr;
      args.residual_stride = args.y_stride = p.y_stride;
      args.y = p.y;
      q::matmul(args, b, e);
    }
  });
}

}  // namespace fastweights::decoding
