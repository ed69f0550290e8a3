#include "linear_attention/kernel.h"

#include "recurrence_test.h"

namespace fastweights::linear_attention {

using R = self_test::Recurrent;

static void check_forward(const char* level, decltype(&baseline::forward) forward) {
  R in;
  self_test::check_forward(
      level, forward, in, [&](Form form) { return in.problem<Problem>(form); },
      [&](int64_t row, double* S, double* o) {
        for (int64_t i = 0; i < R::K; ++i) {
          for (int64_t j = 0; j < R::V; ++j) {
            double& s = S[i * R::V + j];
            s = std::exp(double(in.g[row * R::K + i])) * s + double(in.k[row * R::K + i]) * in.v[row * R::V + j];
            o[j] += R::kScale * s * in.q[row * R::K + i];
          }
        }
      });
}

FW_TEST(linear_attention_forward_in_both_forms) {
  FW_AT_LEVELS(forward, check_forward)
}

}  // namespace fastweights::linear_attention
