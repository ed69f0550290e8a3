// torch's intra-op pool, the only threads there are. Work is split by task, never by thread id, so that results do not
// depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace fastweights {

// Below this much arithmetic a second thread costs more than it saves.
constexpr double kMinFlopsPerThread = 64e3;

// f(begin, end) over [0, tasks), ranges of whole tasks; flops_per_task decides how many tasks a thread gets at least.
template <typename F>
void parallel_tasks(int64_t tasks, double flops_per_task, const F& f) {
  if (tasks <= 0) return;
  const double grain = kMinFlopsPerThread / std::max(flops_per_task, 1.0);
  const int64_t grain_size = std::clamp<int64_t>(static_cast<int64_t>(grain), 1, tasks);
  if (grain_size == tasks) {
    f(0, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, grain_size, f);
  }
}

}  // namespace fastweights
