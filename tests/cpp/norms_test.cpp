#include "norms/kernel.h"
#include "self_test.h"

namespace fastweights::norms {

using self_test::near;
using self_test::normal;
using Numbers = std::vector<float>;

// More rows than a task has, D a multiple of no vector width.
struct Norm {
  static constexpr int64_t kCount = kRows + 6, D = 37;
  static constexpr double kEps = 1e-5;
  Numbers x = normal(kCount * D, 1), gate = normal(kCount * D, 2), weight = normal(D, 3);
  Gate activation;

  explicit Norm(Gate activation) : activation(activation) {}

  static RowSet rows(Numbers& numbers) { return {numbers.data(), {0, 0, D}}; }
  Problem problem() {
    return {rows(x), rows(gate), weight.data(), activation, Element::f32, kEps, {1, 1, kCount}, kCount, D};
  }

  // 1 / sqrt(mean(x^2) + eps)
  double scale(int64_t row) const {
    double squares = 0;
    for (int64_t j = row * D; j < (row + 1) * D; ++j) squares += double(x[j]) * x[j];
    return 1 / std::sqrt(squares / D + kEps);
  }
  double opening(int64_t i) const {
    const double s = 1 / (1 + std::exp(-double(gate[i])));
    return activation == Gate::none ? 1 : activation == Gate::silu ? gate[i] * s : s;
  }
  double opening_derivative(int64_t i) const {
    const double s = 1 / (1 + std::exp(-double(gate[i])));
    return activation == Gate::silu ? s + gate[i] * s * (1 - s) : s * (1 - s);
  }
};

static void check_forward(const char* level, decltype(&baseline::forward) forward) {
  for (Gate activation : {Gate::none, Gate::silu, Gate::sigmoid}) {
    Norm in(activation);
    Numbers y(in.x.size(), NAN);
    forward({in.problem(), in.rows(y)}, 0, 2);
    for (int64_t i = 0; i < int64_t(y.size()); ++i)
      near(level, y[i], in.x[i] * in.scale(i / in.D) * in.weight[i % in.D] * in.opening(i), 1e-6);
  }
}

FW_TEST(norms_forward) {
  FW_AT_LEVELS(forward, check_forward)
}

static void check_backward(const char* level, decltype(&baseline::backward) backward) {
  for (Gate activation : {Gate::none, Gate::silu, Gate::sigmoid}) {
    Norm in(activation);
    Numbers dy = normal(in.x.size(), 4), dx(dy.size(), NAN), dgate(dy.size(), NAN), partial(size_t(2 * in.D), NAN);
    std::vector<double> dweight(in.D);
    backward({in.problem(), in.rows(dy), in.rows(dx), in.rows(dgate), partial.data()}, 0, 2);
    for (int64_t row = 0; row < in.kCount; ++row) {
      const double r = in.scale(row);
      const auto through = [&](int64_t i) { return dy[i] * in.opening(i) * in.weight[i % in.D]; };
      double dr = 0;  // y depends on x directly and through r, whose derivative is -r^3 x / D
      for (int64_t i = row * in.D; i < (row + 1) * in.D; ++i) dr += through(i) * in.x[i];
      for (int64_t i = row * in.D; i < (row + 1) * in.D; ++i) {
        near(level, dx[i], through(i) * r - dr * r * r * r * in.x[i] / in.D, 1e-5);
        dweight[i % in.D] += dy[i] * in.opening(i) * in.x[i] * r;
        if (activation == Gate::none) continue;
        near(level, dgate[i], dy[i] * in.x[i] * r * in.weight[i % in.D] * in.opening_derivative(i), 1e-5);
      }
    }
    for (int64_t j = 0; j < in.D; ++j) near(level, partial[j] + partial[in.D + j], dweight[j], 1e-5);
  }
}

FW_TEST(norms_backward) {
  FW_AT_LEVELS(backward, check_backward)
}

}  // namespace fastweights::norms
