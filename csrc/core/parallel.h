// torch's intra-op pool, the only threads there are. Work is split by task, never by thread id, so that results do not
// depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "denormals.h"

namespace fastweights {

// Below this much arithmetic a second thread costs more than it saves.
constexpr double kMinFlopsPerThread = 64e3;

// f(begin, end) over [0, tasks), ranges of whole tasks; flops_per_task decides how many tasks a thread gets at least.
// Denormals are zero within f, on every thread.
template <typename F>
void parallel_tasks(int64_t tasks, double flops_per_task, const F& f) {
  if (tasks <= 0) return;
  const double grain = kMinFlopsPerThread / std::max(flops_per_task, 1.0);
  const int64_t grain_size = std::clamp<int64_t>(static_cast<int64_t>(grain), 1, tasks);
  const auto flushed = [&f](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    f(begin, end);
  };
  if (grain_size == tasks) {
    flushed(0, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, grain_size, flushed);
  }
}

}  // namespace fastweights
