#include "core/rows.h"
#include "core/scratch.h"

namespace fastweights::FW_LEVEL {

template <typename T>
static void sum_heads_tasks(const SumHeadsArgs& a, int64_t begin, int64_t end) {
  const int64_t Kp = padded<T>(a.K), group = a.HV / a.H;
  Scratch scratch(2 * Scratch::take_bytes<T>(Kp));
  T *sum = scratch.take<T>(Kp), *row = scratch.take<T>(Kp);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.T, t = task % a.T;
    for (int64_t h = 0; h < a.H; ++h) {
      for (int64_t j = 0; j < Kp; ++j) sum[j] = T(0);
      for (int64_t tile = 0; tile < a.tiles; ++tile) {
        for (int64_t i = 0; i < group; ++i) {
          const int64_t head = tile * a.HV + h * group + i;
          load_row(a.in, b * a.in.batch + t * a.in.time + head * a.in.head, a.K, T(1), row);
          for (int64_t j = 0; j < Kp; j += kLanes<T>) store(sum + j, load(sum + j) + load(row + j));
        }
      }
      store_row(a.out, b * a.out.batch + t * a.out.time + h * a.out.head, a.K, sum);
    }
  }
}

void sum_heads(const SumHeadsArgs& a, int64_t begin, int64_t end) noexcept {
  if (a.out.element == Element::f64) {
    sum_heads_tasks<double>(a, begin, end);
  } else {
    sum_heads_tasks<float>(a, begin, end);
  }
}

}  // namespace fastweights::FW_LEVEL
