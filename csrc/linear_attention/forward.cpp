#include "linear_attention/recurrent.h"

namespace fastweights::linear_attention::FW_LEVEL {

template <typename T>
static void forward_tasks(const ForwardArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) recurrent_forward<T>(a, task);
}

void forward(const ForwardArgs& a, int64_t begin, int64_t end) noexcept {
  if (a.p.q.element == Element::f64) {
    forward_tasks<double>(a, begin, end);
  } else {
    forward_tasks<float>(a, begin, end);
  }
}

}  // namespace fastweights::linear_attention::FW_LEVEL
