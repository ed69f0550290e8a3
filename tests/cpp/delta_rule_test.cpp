#include "delta_rule/kernel.h"

#include "self_test.h"

namespace fastweights::delta_rule {

using self_test::near;
using self_test::normal;

// Two sequences of 131 tokens, 2 heads, K = 24, V = 40, a gate per channel: longer than two segments, multiples of no
// vector width. Keys are short, so that no state grows.
struct Inputs {
  static constexpr int64_t N = 2, T = 131, H = 2, K = 24, V = 40;
  std::vector<float> q = normal(N * T * H * K, 1), k = normal(N * T * H * K, 2), v = normal(N * T * H * V, 3);
  std::vector<float> g = normal(N * T * H * K, 4), beta = normal(N * T * H, 5), initial = normal(N * H * K * V, 6);

  Inputs() {
    for (float& x : g) x = -std::abs(x) / 8;
    for (float& x : k) x /= 5;
    for (float& x : beta) x = 1 / (1 + std::exp(-x));
  }

  static Rows rows(std::vector<float>& x, int64_t width) {
    return {x.data(), T * H * width, H * width, width, Element::f32};
  }
  static States states(std::vector<float>& x) { return {x.data(), H * K * V, K * V, V, 1, nullptr}; }

  Problem problem(Form form) {
    Problem p{};
    p.sequences = N, p.T = T, p.H = p.HV = H, p.K = K, p.V = V;
    p.tiles = 1, p.tile_width = V;
    p.q = rows(q, K), p.k = rows(k, K), p.v = rows(v, V), p.g = rows(g, K), p.beta = rows(beta, 1);
    p.gate = Gate::channel, p.form = form, p.scale = 0.25;
    p.initial = states(initial);
    return p;
  }
};

static void expected(const Inputs& in, std::vector<double>& o, std::vector<double>& S) {
  constexpr int64_t T = Inputs::T, H = Inputs::H, K = Inputs::K, V = Inputs::V;
  S.assign(in.initial.begin(), in.initial.end());
  o.assign(in.v.size(), 0);
  for (int64_t n = 0; n < Inputs::N; ++n) {
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t h = 0; h < H; ++h) {
        const size_t row = size_t((n * T + t) * H + h), state = size_t((n * H + h) * K * V);
        for (int64_t j = 0; j < V; ++j) {
          double d = in.v[row * V + j];
          for (int64_t i = 0; i < K; ++i) {
            double& s = S[state + size_t(i * V + j)];
            s *= std::exp(double(in.g[row * K + i]));
            d -= s * in.k[row * K + i];
          }
          for (int64_t i = 0; i < K; ++i) {
            double& s = S[state + size_t(i * V + j)];
            s += in.beta[row] * d * in.k[row * K + i];
            o[row * V + j] += 0.25 * s * in.q[row * K + i];
          }
        }
      }
    }
  }
}

static void check_forward(const char* level, decltype(&baseline::forward) forward) {
  Inputs in;
  std::vector<double> o, S;
  expected(in, o, S);
  for (Form form : {Form::recurrent, Form::chunked}) {
    std::vector<float> got(o.size(), NAN), final(S.size(), NAN);
    ForwardArgs args{in.problem(form), Inputs::rows(got, Inputs::V), Inputs::states(final), nullptr, false};
    forward(args, 0, Inputs::N * Inputs::H);
    for (size_t i = 0; i < o.size(); ++i) near(level, got[i], o[i], 1e-4);
    for (size_t i = 0; i < S.size(); ++i) near(level, final[i], S[i], 1e-4);
  }
}

FW_TEST(delta_rule_forward_in_both_forms) {
  FW_AT_LEVELS(forward, check_forward)
}

}  // namespace fastweights::delta_rule
