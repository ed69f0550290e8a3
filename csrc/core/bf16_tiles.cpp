#include "core/bf16_tiles.h"

#include "core/cpu_level.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastweights {
namespace {

bool detect() noexcept {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  // Linux gives a process the registers only on request.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool has_bf16_tiles() noexcept {
#if FW_LEVELS == 4
  static const bool found = detect();
  return found && cpu_level() == CpuLevel::avx512_bf16;
#else
  return false;
#endif
}

}  // namespace fastweights
