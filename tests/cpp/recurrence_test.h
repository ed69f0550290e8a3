// Tests of a gated recurrence's forward against its definition, one token after the other in double.
#pragma once

#include "core/recurrence.h"
#include "self_test.h"

namespace self_test {

// Two sequences of 131 tokens, 2 heads, K = 24, V = 40, a gate per channel: longer than two segments, multiples of no
// vector width.
struct Recurrent {
  static constexpr int64_t N = 2, T = 131, H = 2, K = 24, V = 40;
  static constexpr double kScale = 0.25;
  std::vector<float> q = normal(N * T * H * K, 1), k = normal(N * T * H * K, 2), v = normal(N * T * H * V, 3);
  std::vector<float> g = normal(N * T * H * K, 4), initial = normal(N * H * K * V, 5);

  Recurrent() {
    for (float& x : g) x = -std::abs(x) / 8;
  }

  static fastweights::Rows rows(std::vector<float>& x, int64_t width) {
    return {x.data(), T * H * width, H * width, width, fastweights::Element::f32};
  }
  static fastweights::States states(std::vector<float>& x) { return {x.data(), H * K * V, K * V, V, 1, nullptr}; }

  template <typename Problem>
  Problem problem(fastweights::Form form) {
    Problem p{};
    p.sequences = N, p.T = T, p.H = p.HV = H, p.K = K, p.V = V;
    p.tiles = 1, p.tile_width = V;
    p.q = rows(q, K), p.k = rows(k, K), p.v = rows(v, V), p.g = rows(g, K);
    p.gate = fastweights::Gate::channel, p.form = form, p.scale = kScale;
    p.initial = states(initial);
    return p;
  }
};

// Both forms of `forward` against update(row, S, o): what token and head number `row` makes of its state S [K, V] and
// its output o [V]. problem(form) describes the inputs to the kernel.
template <typename Args, typename Describe, typename Update>
void check_forward(const char* level, void (*forward)(const Args&, int64_t, int64_t) noexcept, Recurrent& in,
                   const Describe& problem, const Update& update) {
  using R = Recurrent;
  std::vector<double> S(in.initial.begin(), in.initial.end()), o(in.v.size(), 0);
  for (int64_t n = 0; n < R::N; ++n) {
    for (int64_t t = 0; t < R::T; ++t) {
      for (int64_t h = 0; h < R::H; ++h) {
        const int64_t row = (n * R::T + t) * R::H + h;
        update(row, &S[size_t((n * R::H + h) * R::K * R::V)], &o[size_t(row * R::V)]);
      }
    }
  }
  for (fastweights::Form form : {fastweights::Form::recurrent, fastweights::Form::chunked}) {
    std::vector<float> got(o.size(), NAN), final(S.size(), NAN);
    Args args{};
    args.p = problem(form), args.o = R::rows(got, R::V), args.final = R::states(final);
    forward(args, 0, R::N * R::H);
    for (size_t i = 0; i < o.size(); ++i) near(level, got[i], o[i], 1e-4);
    for (size_t i = 0; i < S.size(); ++i) near(level, final[i], S[i], 1e-4);
  }
}

}  // namespace self_test
