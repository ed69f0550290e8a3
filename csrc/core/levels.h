// What the torch side and the kernels agree on: the element types behind a void*, and the CPU levels that a kernel is
// compiled for. Plain macros and declarations, so that kernel files may include it.
#pragma once

#include <stdint.h>

namespace fastweights {
enum class Element : int { f32, bf16, f16, f64 };
}

// FW_LEVELS is how many levels are built, from the lowest: a build for tests does with those that its machine has.
#if !defined(__x86_64__)
#undef FW_LEVELS
#define FW_LEVELS 1
#elif !defined(FW_LEVELS)
#define FW_LEVELS 4
#endif

// FW_FOR_EACH_LEVEL(X, ...) is X(level, ...) for every level that is built.
#if FW_LEVELS == 1
#define FW_FOR_EACH_LEVEL(X, ...) X(baseline __VA_OPT__(, ) __VA_ARGS__)
#elif FW_LEVELS == 2
#define FW_FOR_EACH_LEVEL(X, ...) X(baseline __VA_OPT__(, ) __VA_ARGS__) X(avx2 __VA_OPT__(, ) __VA_ARGS__)
#elif FW_LEVELS == 3
#define FW_FOR_EACH_LEVEL(X, ...)        \
  X(baseline __VA_OPT__(, ) __VA_ARGS__) \
  X(avx2 __VA_OPT__(, ) __VA_ARGS__) X(avx512 __VA_OPT__(, ) __VA_ARGS__)
#else
#define FW_FOR_EACH_LEVEL(X, ...)        \
  X(baseline __VA_OPT__(, ) __VA_ARGS__) \
  X(avx2 __VA_OPT__(, ) __VA_ARGS__)     \
  X(avx512 __VA_OPT__(, ) __VA_ARGS__)   \
  X(avx512_bf16 __VA_OPT__(, ) __VA_ARGS__)
#endif

// Declares `void name(const Args&, int64_t begin, int64_t end) noexcept` once per level, each in the namespace of its
// level inside the current one. A kernel does the tasks [begin, end); what a task is, its Args say.
#define FW_DECLARE_KERNEL(name, Args) FW_FOR_EACH_LEVEL(FW_DECLARE_AT, name, Args)
#define FW_DECLARE_AT(level, name, Args)                       \
  namespace level {                                            \
  void name(const Args&, int64_t begin, int64_t end) noexcept; \
  }
