#include "core/cpu_level.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__unix__)
#include <unistd.h>
#endif

namespace fastweights {
namespace {

#if defined(__x86_64__)
// Clang 14's __builtin_cpu_supports does not know the name.
bool has_f16c() noexcept {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

int detect() noexcept {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  return bf16 ? 3 : avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

int find(const char* name) noexcept {
  for (int i = 0; i <= static_cast<int>(best_cpu_level()); ++i) {
    if (std::strcmp(name, kCpuLevelNames[i]) == 0) return i;
  }
  return -1;
}

// An unusable FASTWEIGHTS_CPU_LEVEL is reported by the Python module, which sets it again at import.
std::atomic<int>& current() noexcept {
  static std::atomic<int> level = [] {
    const char* forced = std::getenv("FASTWEIGHTS_CPU_LEVEL");
    const int found = forced ? find(forced) : -1;
    return found >= 0 ? found : static_cast<int>(best_cpu_level());
  }();
  return level;
}

}  // namespace
CpuLevel best_cpu_level() noexcept {
  static const CpuLevel best = static_cast<CpuLevel>(std::min(detect(), kCpuLevels - 1));
  return best;
}

CpuLevel cpu_level() noexcept {
  return static_cast<CpuLevel>(current().load(std::memory_order_relaxed));
}

void set_cpu_level(const char* name) {
  const int found = find(name);
  if (found < 0) {
    std::string allowed;
    for (int i = 0; i <= static_cast<int>(best_cpu_level()); ++i)
      allowed += std::string(i ? ", " : "") + kCpuLevelNames[i];
    throw std::runtime_error("cpu_level: expected one of " + allowed + " on this machine, got '" + name + "'");
  }
  current().store(found, std::memory_order_relaxed);
}

int64_t cache_bytes() noexcept {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 512 * 1024;
}

}  // namespace fastweights
