// A team of torch's threads that goes through many short phases inside one parallel region: waking the pool costs tens
// of microseconds, a phase here a fraction of one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "core/denormals.h"

namespace fastweights::decoding {

// Every member calls the same sequence of `run`s, each a phase of independent tasks. Members claim tasks until none is
// left and then wait for those that others have claimed, never for the others themselves: a team whose members come
// one after another, on however many threads, makes the same progress, and cannot deadlock.
class Team {
  // On lines of their own, so that waiting for one phase does not slow down the claims of another.
  struct alignas(64) Counters {
    std::atomic<int64_t> claimed{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

 public:
  explicit Team(int64_t phases) : counters_(new Counters[size_t(phases)]) {}

  class Member {
   public:
    // f(begin, end) over the tasks [0, tasks), `grain` or fewer at a time. f must not throw.
    template <typename F>
    void run(int64_t tasks, int64_t grain, const F& f) {
      Counters& phase = *next_++;
      for (;;) {
        const int64_t begin = phase.claimed.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= tasks) break;
        const int64_t end = std::min(begin + grain, tasks);
        f(begin, end);
        phase.done.fetch_add(end - begin, std::memory_order_release);
      }
      for (int spins = 0; phase.done.load(std::memory_order_acquire) < tasks; ++spins) {
        if (spins < kSpins) {
          pause();
        } else {
          std::this_thread::yield();
        }
      }
    }

   private:
    friend class Team;
    explicit Member(Team& team) : next_(team.counters_.get()) {}
    Counters* next_;
  };

  // work(member) once on every thread of torch's pool.
  template <typename F>
  void enter(int64_t threads, const F& work) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      const FlushDenormals flush;
      Member member(*this);
      work(member);
    });
  }

 private:
  static constexpr int kSpins = 2000;  // some tens of microseconds: longer waits mean that a thread lost its core

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::unique_ptr<Counters[]> counters_;
};

}  // namespace fastweights::decoding
