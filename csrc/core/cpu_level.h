// Which instruction level runs: the best that the machine has, less if FASTWEIGHTS_CPU_LEVEL or set_cpu_level says so.
#pragma once

#include "core/levels.h"

namespace fastweights {

enum class CpuLevel : int {
#define FW_ENUMERATOR(level) level,
  FW_FOR_EACH_LEVEL(FW_ENUMERATOR)
#undef FW_ENUMERATOR
};

constexpr const char* kCpuLevelNames[] = {
#define FW_NAME(level) #level,
    FW_FOR_EACH_LEVEL(FW_NAME)
#undef FW_NAME
};
constexpr int kCpuLevels = sizeof(kCpuLevelNames) / sizeof(kCpuLevelNames[0]);

#pragma GCC visibility push(default)
CpuLevel best_cpu_level() noexcept;
CpuLevel cpu_level() noexcept;

// Throws std::runtime_error for an unknown name or a level that this machine lacks.
void set_cpu_level(const char* name);
#pragma GCC visibility pop

}  // namespace fastweights

// FW_KERNEL(name): the variant, for the level that runs, of the kernel declared by FW_DECLARE_KERNEL in this namespace.
#if defined(__x86_64__)
#define FW_KERNEL(name)                                                                                   \
  ([] {                                                                                                   \
    static constexpr decltype(&baseline::name) variants[] = {&baseline::name, &avx2::name, &avx512::name, \
                                                             &avx512_bf16::name};                         \
    return variants[static_cast<int>(::fastweights::cpu_level())];                                        \
  }())
#else
#define FW_KERNEL(name) (&baseline::name)
#endif
