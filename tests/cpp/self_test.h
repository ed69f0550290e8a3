// The least that tests without a framework need: registered cases, a comparison that says what differs, levels.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "core/levels.h"

namespace self_test {

using Case = void (*)();
void add(const char* name, Case run);
void fail(const char* what, double got, double expected);

// Whether this machine runs the level.
bool runs(const char* level);

inline void near(const char* what, double got, double expected, double tolerance) {
  if (!(std::abs(got - expected) <= tolerance * (1 + std::abs(expected)))) fail(what, got, expected);
}

inline std::vector<float> normal(size_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> draw;
  std::vector<float> x(n);
  for (float& v : x) v = draw(generator);
  return x;
}

struct Register {
  Register(const char* name, Case run) { add(name, run); }
};

}  // namespace self_test

#define FW_TEST(name)                                              \
  static void name();                                              \
  static const self_test::Register registered_##name(#name, name); \
  static void name()

// FW_AT_LEVELS(f, check): check(level, the kernel f of its namespace) for every level that this machine runs.
#define FW_AT_LEVEL(level, kernel, check) \
  if (self_test::runs(#level)) check(#level, &level::kernel);
#define FW_AT_LEVELS(kernel, check) FW_FOR_EACH_LEVEL(FW_AT_LEVEL, kernel, check)
