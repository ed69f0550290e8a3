#include "self_test.h"

#include <cstring>

namespace self_test {
namespace {

struct Named {
  const char* name;
  Case run;
};

std::vector<Named>& cases() {
  static std::vector<Named> all;
  return all;
}

int failures = 0;

}  // namespace

void add(const char* name, Case run) {
  cases().push_back({name, run});
}

void fail(const char* what, double got, double expected) {
  if (++failures <= 20) std::printf("  %s: expected %.9g, got %.9g\n", what, expected, got);
}

bool runs(const char* level) {
#if defined(__x86_64__)
  if (std::strcmp(level, "baseline") == 0) return true;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(level, "avx2") == 0) return avx2;
  if (std::strcmp(level, "avx512") == 0) return avx512;
  return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#else
  return std::strcmp(level, "baseline") == 0;
#endif
}

}  // namespace self_test

int main() {
  using namespace self_test;
  int failed = 0;
  for (const auto& [name, run] : cases()) {
    const int before = failures;
    run();
    failed += failures > before;
    std::printf("%s %s\n", failures > before ? "FAILED" : "passed", name);
  }
  std::printf("%d passed, %d failed\n", int(cases().size()) - failed, failed);
  return failed != 0;
}
