#include "delta_rule/kernel.h"

#include "recurrence_test.h"

namespace fastweights::delta_rule {

using R = self_test::Recurrent;

static void check_forward(const char* level, decltype(&baseline::forward) forward) {
  R in;
  for (float& x : in.k) x /= 5;  // short keys, so that no state grows
  std::vector<float> beta = self_test::normal(R::N * R::T * R::H, 6);
  for (float& x : beta) x = 1 / (1 + std::exp(-x));
  const auto problem = [&](Form form) {
    Problem p = in.problem<Problem>(form);
    p.beta = R::rows(beta, 1);
    return p;
  };
  self_test::check_forward(level, forward, in, problem, [&](int64_t row, double* S, double* o) {
    for (int64_t j = 0; j < R::V; ++j) {
      double d = in.v[row * R::V + j];
      for (int64_t i = 0; i < R::K; ++i) {
        S[i * R::V + j] *= std::exp(double(in.g[row * R::K + i]));
        d -= S[i * R::V + j] * in.k[row * R::K + i];
      }
      for (int64_t i = 0; i < R::K; ++i) {
        S[i * R::V + j] += beta[row] * d * in.k[row * R::K + i];
        o[j] += R::kScale * S[i * R::V + j] * in.q[row * R::K + i];
      }
    }
  });
}

FW_TEST(delta_rule_forward_in_both_forms) {
  FW_AT_LEVELS(forward, check_forward)
}

}  // namespace fastweights::delta_rule
