#include "causal_conv1d/kernel.h"
#include "self_test.h"

namespace fastweights::causal_conv1d {

using self_test::near;
using self_test::normal;
using Numbers = std::vector<float>;

// Two sequences with SiLU, bias, residual and an initial state that is longer than the taps need.
struct Convolution {
  static constexpr int64_t N = 2, S = 5;
  const bool lines;
  const int64_t W, T, D;
  Numbers x, residual, weight, bias, initial;
  std::vector<Segment> segments;
  std::vector<Tile> tiles;

  Convolution(bool lines, int64_t W, int64_t T, int64_t D)
      : lines(lines),
        W(W),
        T(T),
        D(D),
        x(normal(N * T * D, 1)),
        residual(normal(N * T * D, 2)),
        weight(normal(W * D, 3)),
        bias(normal(D, 4)),
        initial(normal(N * D * S, 5)) {
    const int64_t most = lines ? kLineTokens : kRowTokens;
    for (int64_t n = 0; n < N; ++n) {
      segments.push_back({n, 0, T, n, n});
      for (int64_t t = 0; t < T; t += most) tiles.push_back({n, t, t + most < T ? t + most : T});
    }
  }

  int64_t at(int64_t n, int64_t t, int64_t d) const { return n * T * D + (lines ? d * T + t : t * D + d); }
  Signal signal(Numbers& s) const { return {s.data(), T * D, lines ? 1 : D, lines ? T : 1}; }
  State state(Numbers& s) const { return {s.data(), D * S, S, 1}; }

  Problem problem() {
    const int64_t width = lines ? kLineChannels : kRowChannels;
    return {signal(x),
            Element::f32,
            weight.data(),
            bias.data(),
            true,
            lines,
            N,
            T,
            D,
            W,
            S,
            segments.data(),
            tiles.data(),
            int64_t(tiles.size()),
            (D + width - 1) / width,
            state(initial)};
  }

  // f(number of the tap, what it reads) for output t: an input, or the initial state before the first.
  template <typename Vector, typename F>
  void for_taps(Vector& inputs, Vector& before, int64_t n, int64_t t, int64_t d, const F& f) const {
    for (int64_t w = 0; w < W; ++w) {
      const int64_t from = t - W + 1 + w;
      f(w * D + d, from < 0 ? before[(n * D + d) * S + S + from] : inputs[at(n, from, d)]);
    }
  }

  double sum(int64_t n, int64_t t, int64_t d) const {
    double z = bias[d];
    for_taps(x, initial, n, t, d, [&](int64_t w, float seen) { z += double(weight[w]) * seen; });
    return z;
  }

  double output(int64_t n, int64_t t, int64_t d) const {
    const double z = sum(n, t, d);
    return z / (1 + std::exp(-z)) + residual[at(n, t, d)];
  }

  // Input number T - S + i, which index i of a state after T tokens holds.
  template <typename Vector>
  auto& latest(Vector& inputs, Vector& before, int64_t n, int64_t d, int64_t i) const {
    return T + i < S ? before[(n * D + d) * S + T + i] : inputs[at(n, T - S + i, d)];
  }

  // f(n, t, d) for every number of a signal.
  template <typename F>
  void for_signal(int64_t tokens, const F& f) const {
    for (int64_t n = 0; n < N; ++n)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t d = 0; d < D; ++d) f(n, t, d);
  }
};

// Both memory orders, with more than one tile and, of lines, more than one block of channels; four taps and another
// number of them.
template <typename F>
static void for_convolutions(const F& f) {
  for (int64_t W : {3, 4}) {
    f(Convolution(false, W, kRowTokens + 6, 37));
    f(Convolution(true, W, kLineTokens + 6, kLineChannels + 3));
  }
}

static void check_forward(const char* level, decltype(&baseline::forward) forward) {
  for_convolutions([&](Convolution in) {
    Numbers y(in.x.size(), NAN), final(in.initial.size(), NAN);
    const ForwardArgs args{in.problem(), in.signal(y), in.signal(in.residual), in.state(final)};
    forward(args, 0, args.p.tile_count * args.p.channel_blocks);
    in.for_signal(in.T, [&](auto... at) { near(level, y[in.at(at...)], in.output(at...), 1e-6); });
    in.for_signal(in.S, [&](int64_t n, int64_t i, int64_t d) {
      near(level, final[(n * in.D + d) * in.S + i], in.latest(in.x, in.initial, n, d, i), 0);
    });
  });
}

FW_TEST(causal_conv1d_forward) {
  FW_AT_LEVELS(forward, check_forward)
}

static void check_backward(const char* level, decltype(&baseline::backward) backward) {
  for_convolutions([&](Convolution in) {
    Numbers dy = normal(in.x.size(), 6), dfinal = normal(in.initial.size(), 7);
    std::vector<double> dx(in.x.size()), dinitial(in.initial.size()), dweight(in.weight.size()), dbias(in.bias.size());
    in.for_signal(in.T, [&](int64_t n, int64_t t, int64_t d) {
      const double z = in.sum(n, t, d), s = 1 / (1 + std::exp(-z)), dz = dy[in.at(n, t, d)] * (s + z * s * (1 - s));
      dbias[d] += dz;
      in.for_taps(in.x, in.initial, n, t, d, [&](int64_t w, float seen) { dweight[w] += dz * seen; });
      in.for_taps(dx, dinitial, n, t, d, [&](int64_t w, double& sum) { sum += dz * in.weight[w]; });
    });
    in.for_signal(in.S, [&](int64_t n, int64_t i, int64_t d) {
      in.latest(dx, dinitial, n, d, i) += dfinal[(n * in.D + d) * in.S + i];
    });

    const Problem p = in.problem();
    Numbers got_x(dx.size(), NAN), got_initial(dinitial.size(), NAN);
    Numbers partial(size_t(p.tile_count * (in.W + 1) * in.D), NAN);
    const BackwardArgs args{
        p, in.signal(dy), in.signal(got_x), in.state(got_initial), in.state(dfinal), partial.data()};
    backward(args, 0, p.tile_count * p.channel_blocks);
    for (size_t i = 0; i < dx.size(); ++i) near(level, got_x[i], dx[i], 1e-5);
    for (size_t i = 0; i < dinitial.size(); ++i) near(level, got_initial[i], dinitial[i], 1e-5);
    dweight.insert(dweight.end(), dbias.begin(), dbias.end());
    for (size_t i = 0; i < dweight.size(); ++i) {
      double sum = 0;
      for (size_t from = i; from < partial.size(); from += dweight.size()) sum += partial[from];
      near(level, sum, dweight[i], 1e-4);
    }
  });
}

FW_TEST(causal_conv1d_backward) {
  FW_AT_LEVELS(backward, check_backward)
}

// A state in the order of time, and a ring that 8 tokens came before, in the row of the other sequence.
static void check_update(const char* level, decltype(&baseline::update) update) {
  for (int64_t W : {3, 4}) {
    for (bool ring : {false, true}) {
      Convolution in(false, W, 9, kRowChannels + 5);
      const auto place = [&](int64_t n, int64_t i, int64_t d, int64_t seen) {
        return ring ? ((1 - n) * in.D + d) * in.S + (seen + i) % in.S : (n * in.D + d) * in.S + i;
      };
      Numbers y(in.x.size(), NAN), state(in.initial.size(), NAN);
      in.for_signal(in.S, [&](int64_t n, int64_t i, int64_t d) {
        state[place(n, i, d, 8)] = in.initial[(n * in.D + d) * in.S + i];
      });
      const int64_t rows[] = {1, 0}, slots[] = {8 % in.S, 8 % in.S};
      UpdateArgs args{in.signal(in.x),
                      in.signal(y),
                      in.signal(in.residual),
                      Element::f32,
                      in.weight.data(),
                      in.bias.data(),
                      true,
                      in.T,
                      in.D,
                      W,
                      in.S,
                      2,
                      in.state(state),
                      ring ? rows : nullptr,
                      ring ? slots : nullptr};
      update(args, 0, in.N * args.channel_blocks);
      in.for_signal(in.T, [&](auto... at) { near(level, y[in.at(at...)], in.output(at...), 1e-6); });
      in.for_signal(in.S, [&](int64_t n, int64_t i, int64_t d) {
        near(level, state[place(n, i, d, 8 + in.T)], in.latest(in.x, in.initial, n, d, i), 0);
      });
    }
  }
}

FW_TEST(causal_conv1d_update) {
  FW_AT_LEVELS(update, check_update)
}

}  // namespace fastweights::causal_conv1d
