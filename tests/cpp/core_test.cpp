#include <cstring>

#include "core/probe.h"
#include "self_test.h"

namespace fastweights::probe {

using self_test::near;
using self_test::normal;

static void check_math(const char* level, decltype(&baseline::math) math) {
  std::vector<float> x = normal(4099, 1);
  for (float& v : x) v *= 8;
  std::vector<float> out(x.size());
  double (*exact[])(double) = {[](double t) { return std::exp(t); }, [](double t) { return std::log(std::abs(t)); },
                               [](double t) { return 1 / (1 + std::exp(-t)); },
                               [](double t) { return std::log1p(std::exp(t)); }, [](double t) { return std::tanh(t); }};
  for (int f = 0; f < 5; ++f) {
    std::vector<float> in = x;
    if (f == int(Function::log)) {
      for (float& v : in) v = std::abs(v);
    }
    math({Function(f), Element::f32, in.data(), out.data(), int64_t(in.size())}, 0, 1);
    for (size_t i = 0; i < in.size(); ++i) near(level, out[i], exact[f](in[i]), 1e-6);
  }
}

FW_TEST(vector_math) {
  FW_AT_LEVELS(math, check_math)
}

static void check_conversion(const char* level, decltype(&baseline::convert) convert) {
  for (Element half : {Element::bf16, Element::f16}) {
    std::vector<uint16_t> bits(65536), back(65536);
    std::vector<float> wide(65536);
    for (int i = 0; i < 65536; ++i) bits[i] = uint16_t(i);
    convert({half, true, bits.data(), wide.data(), 65536}, 0, 1);
    convert({half, false, wide.data(), back.data(), 65536}, 0, 1);
    for (int i = 0; i < 65536; ++i) {
      if (!std::isnan(wide[i])) near(level, back[i], bits[i], 0);
    }
  }
}

FW_TEST(every_half_survives_the_round_trip) {
  FW_AT_LEVELS(convert, check_conversion)
}

static void check_product(const char* level, decltype(&baseline::gemm_tile) gemm) {
  for (int64_t M : {1, 5, 6, 13}) {
    const int64_t N = 80, K = 37;
    const std::vector<float> a = normal(size_t(M * K), 2), b = normal(size_t(K * N), 3);
    std::vector<float> c(size_t(M * N), NAN);
    gemm({false, M, N, K, 1, a.data(), b.data(), c.data()}, 0, 1);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += double(a[size_t(m * K + k)]) * b[size_t(k * N + n)];
        near(level, c[size_t(m * N + n)], sum, 1e-5);
      }
    }
  }
}

FW_TEST(small_products) {
  FW_AT_LEVELS(gemm_tile, check_product)
}

}  // namespace fastweights::probe
