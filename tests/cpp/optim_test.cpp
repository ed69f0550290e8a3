#include "optim/kernel.h"

#include "self_test.h"

namespace fastweights::optim {

// Not a multiple of a vector, a block or a task.
constexpr int64_t kSize = 4096 + 256 + 5, kBlock = 256, kBlocks = (kSize + kBlock - 1) / kBlock;

// The levels of the map with signs, from their definition.
static std::vector<double> levels() {
  std::vector<double> positive;
  for (int i = 0; i < 7; ++i) {
    for (int j = 0; j < 1 << i; ++j) positive.push_back(std::pow(10, i - 6) * (0.1 + 0.9 * (j + 0.5) / (1 << i)));
  }
  std::vector<double> all;
  for (size_t i = positive.size(); i-- > 0;) all.push_back(-positive[i]);
  all.push_back(0);
  all.insert(all.end(), positive.begin(), positive.end());
  all.push_back(1);
  return all;
}

struct Coded {
  std::vector<uint8_t> codes = std::vector<uint8_t>(kSize);
  std::vector<float> absmax = std::vector<float>(kBlocks);

  CodecArgs args(std::vector<float>& x) {
    return {Element::f32, x.data(), codes.data(), absmax.data(), kSize, kBlock, true};
  }
};

static void check_codes(const char* level, decltype(&baseline::quantize_blockwise) quantize) {
  std::vector<float> x = self_test::normal(kSize, 1);
  for (int64_t i = 0; i < kSize; i += 3) x[i] *= float(std::pow(10, -double(i % 9)));
  Coded coded;
  quantize(coded.args(x), 0, tasks_of(kSize));
  const std::vector<double> all = levels();
  for (int64_t i = 0; i < kSize; ++i) {
    const double scaled = double(x[i]) / coded.absmax[i / kBlock];
    double best = 9;
    for (double l : all) best = std::min(best, std::abs(scaled - l));
    const double chosen = std::abs(scaled - all[coded.codes[i]]);
    if (!(chosen <= best + 1e-6 * std::abs(scaled))) self_test::fail(level, chosen, best);
  }
}

static void check_levels(const char* level, decltype(&baseline::dequantize_blockwise) dequantize) {
  std::vector<float> x(kSize);
  Coded coded;
  for (int64_t i = 0; i < kSize; ++i) coded.codes[i] = uint8_t(i * 7);
  for (int64_t i = 0; i < kBlocks; ++i) coded.absmax[i] = float(i);
  dequantize(coded.args(x), 0, tasks_of(kSize));
  const std::vector<double> all = levels();
  for (int64_t i = 0; i < kSize; ++i) {
    self_test::near(level, x[i], double(i / kBlock) * all[coded.codes[i]], 1e-6);
  }
}

// Adam from states of zero: the parameter moves as with states of any precision.
static void check_step(const char* level, decltype(&baseline::step) step) {
  const std::vector<float> before = self_test::normal(kSize, 2), grad = self_test::normal(kSize, 3);
  std::vector<float> param = before;
  Coded m, v;
  m.codes.assign(kSize, 127);
  const StepTensor tensor{
      param.data(), grad.data(), {m.codes.data(), v.codes.data()}, {m.absmax.data(), v.absmax.data()}, kSize, 0,
      Element::f32};
  const Coefficients c{0.1, 0.99, 0.9, 0.999, 1e-8, 0};
  const StepArgs args{&tensor, 1, Rule::adam, true, kBlock, c, false, 0};
  step(args, 0, tasks_of(kSize));
  const std::vector<double> all = levels();
  for (int64_t i = 0; i < kSize; ++i) {
    const double g = grad[i];
    self_test::near(level, param[i], 0.99 * before[i] - 0.1 * (0.1 * g) / (std::sqrt(0.001 * g * g) + 1e-8), 1e-5);
    const double scale = m.absmax[i / kBlock];
    self_test::near(level, scale * all[m.codes[i]], 0.1 * g, 0.9 / 128 * scale * 1.01);
  }
}

FW_TEST(optim_codes_are_nearest){FW_AT_LEVELS(quantize_blockwise, check_codes)} FW_TEST(optim_levels){
    FW_AT_LEVELS(dequantize_blockwise, check_levels)} FW_TEST(optim_step) {
  FW_AT_LEVELS(step, check_step)
}

}  // namespace fastweights::optim
