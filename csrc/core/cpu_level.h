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

// Bytes of a core's second-level cache, 512 KiB where the system does not say.
int64_t cache_bytes() noexcept;
#pragma GCC visibility pop

}  // namespace fastweights

// FW_KERNEL(name): the variant, for the level that runs, of the kernel declared by FW_DECLARE_KERNEL in this namespace.
#define FW_KERNEL(name)                                                                            \
  ([] {                                                                                            \
    static constexpr decltype(&baseline::name) variants[] = {FW_FOR_EACH_LEVEL(FW_VARIANT, name)}; \
    return variants[static_cast<int>(::fastweights::cpu_level())];                                 \
  }())
#define FW_VARIANT(level, name) &level::name,
