// What the torch side and the kernels agree on: the element types behind a void*, and the CPU levels that a kernel is
// compiled for. Plain macros and declarations, so that kernel files may include it.
#pragma once

#include <stdint.h>

namespace fastweights {
enum class Element : int { f32, bf16, f16, f64 };
}

#if defined(__x86_64__)
#define FW_FOR_EACH_LEVEL(X) X(baseline) X(avx2) X(avx512) X(avx512_bf16)
#else
#define FW_FOR_EACH_LEVEL(X) X(baseline)
#endif

// Declares `void name(const Args&, int64_t begin, int64_t end) noexcept` once per level, each in the namespace of its
// level inside the current one. A kernel does the tasks [begin, end); what a task is, its Args say.
#define FW_DECLARE_KERNEL(name, Args)                          \
  namespace baseline {                                         \
  void name(const Args&, int64_t begin, int64_t end) noexcept; \
  }                                                            \
  FW_DECLARE_X86(name, Args)
#if defined(__x86_64__)
#define FW_DECLARE_X86(name, Args)                             \
  namespace avx2 {                                             \
  void name(const Args&, int64_t begin, int64_t end) noexcept; \
  }                                                            \
  namespace avx512 {                                           \
  void name(const Args&, int64_t begin, int64_t end) noexcept; \
  }                                                            \
  namespace avx512_bf16 {                                      \
  void name(const Args&, int64_t begin, int64_t end) noexcept; \
  }
#else
#define FW_DECLARE_X86(name, Args)
#endif
