#include "lora/kernel.h"
#include "self_test.h"

namespace fastweights::lora {

using self_test::near;
using self_test::normal;
using Numbers = std::vector<float>;

static std::vector<const void*> rows_of(const Numbers& matrix, int64_t columns) {
  std::vector<const void*> rows;
  for (size_t i = 0; i < matrix.size(); i += size_t(columns)) rows.push_back(matrix.data() + i);
  return rows;
}

// More rows than a block of few has, columns beyond what is packed at a time and no multiple of any vector.
struct Adapter {
  static constexpr int64_t kCount = 13, kIn = 259, kOut = 70, kRank = 5;
  Numbers x = normal(kCount * kIn, 1), y = normal(kCount * kOut, 2), a = normal(kRank * kIn, 3),
          b = normal(kRank * kOut, 4);
  std::vector<const void*> down = rows_of(a, kIn), up = rows_of(b, kOut);

  Adapter() {
    for (float& v : a) v /= 16;  // u of the size of y, which errors are measured by
  }

  double u(int64_t m, int64_t r) const {
    double sum = 0;
    for (int64_t j = 0; j < kIn; ++j) sum += double(x[m * kIn + j]) * a[r * kIn + j];
    return sum;
  }
};

// All rows of kOrder, which skips row 9, and no other.
constexpr int64_t kOrder[] = {0, 1, 2, 3, 4, 5, 6, 7, 12, 8, 11, 10};

static void check_updated(const char* level, const Adapter& in, const Numbers& y, const Numbers& c) {
  for (int64_t m = 0; m < in.kCount; ++m) {
    for (int64_t o = 0; o < in.kOut; ++o) {
      double expected = in.y[m * in.kOut + o];
      for (int64_t r = 0; m != 9 && r < in.kRank; ++r) expected += in.u(m, r) * in.b[r * in.kOut + o];
      near(level, y[m * in.kOut + o], expected, 1e-5);
    }
    for (int64_t r = 0; m != 9 && r < in.kRank; ++r) near(level, c[m * in.kRank + r], in.u(m, r), 1e-5);
  }
}

static void check_update(const char* level, decltype(&baseline::update) update) {
  const Adapter in;
  Numbers x = in.x, y = in.y, c(in.kCount * in.kRank, NAN);
  const Block blocks[] = {{0, 8, 0, in.kRank, 0}, {8, 4, 0, in.kRank, 0}};
  const Part part{0, in.kRank, 0, in.kOut};
  UpdateArgs args{};
  args.element = Element::f32;
  args.blocks = blocks;
  args.parts = &part;
  args.parts_of_block = 1;
  args.order = kOrder;
  args.in = {x.data(), in.kIn, in.kIn};
  args.out = {y.data(), in.kOut, in.kOut};
  args.down = in.down.data();
  args.up = in.up.data();
  args.c = {c.data(), in.kRank, in.kRank};
  update(args, 0, 2);
  check_updated(level, in, y, c);
}

FW_TEST(lora_update) {
  FW_AT_LEVELS(update, check_update)
}

static void check_few(const char* level, decltype(&baseline::shrink_few) shrink,
                      decltype(&baseline::shrink_few) expand) {
  const Adapter in;
  Numbers x = in.x, y = in.y, c(in.kCount * in.kRank, NAN), b(in.kOut * in.kRank);
  for (int64_t r = 0; r < in.kRank; ++r) {
    for (int64_t o = 0; o < in.kOut; ++o) b[o * in.kRank + r] = in.b[r * in.kOut + o] / 2;
  }
  // Ranks in two tasks; B as two pairs of one term.
  const RanksTask ranks[] = {{0, 12, 0, 3, 0}, {0, 12, 3, 2, 3}};
  const Up ups[] = {{Element::f32, {b.data(), in.kRank, 4}, 2.0, 0},
                    {Element::f32, {b.data() + 4, in.kRank, 1}, 2.0, 4}};
  const Term term{0, in.kRank, ups, 2};
  const OutputsTask outputs[] = {{0, 12, 0, kFewOutputs, 0, &term, 1},
                                 {0, 12, kFewOutputs, in.kOut - kFewOutputs, kFewOutputs, &term, 1}};
  FewArgs args{};
  args.element = Element::f32;
  args.order = kOrder;
  args.in = {x.data(), in.kIn, in.kIn};
  args.out = {y.data(), in.kOut, in.kOut};
  args.c = {c.data(), in.kRank, in.kRank};
  args.down = in.down.data();
  args.ranks = ranks;
  args.outputs = outputs;
  shrink(args, 0, 2);
  expand(args, 0, 2);
  check_updated(level, in, y, c);
}

#define FW_FEW_AT(level) \
  if (self_test::runs(#level)) check_few(#level, &level::shrink_few, &level::expand_few);

FW_TEST(lora_few) {
  FW_FOR_EACH_LEVEL(FW_FEW_AT)
}

static void check_gradient(const char* level, decltype(&baseline::gradient) gradient) {
  constexpr int64_t kCount = kGradientRows + 3, kIn = kGradientColumns + 5, kRank = 3;
  Numbers x = normal(kCount * kIn, 1), c = normal(kCount * kRank, 2), out(kRank * kIn, NAN);
  const double factors[] = {1.0, 0.5, -2.0};
  const Block group{0, kCount, 0, kRank, 0};
  const int64_t c_column = 0;
  GradientArgs args{};
  args.element = Element::f32;
  args.groups = &group;
  args.c_columns = &c_column;
  args.strips = 2;
  args.in = {x.data(), kIn, kIn};
  args.c = {c.data(), kRank, kRank};
  args.out = {out.data(), kIn, kIn};
  args.factors = factors;
  gradient(args, 0, 2);
  for (int64_t r = 0; r < kRank; ++r) {
    for (int64_t j = 0; j < kIn; ++j) {
      double sum = 0;
      for (int64_t m = 0; m < kCount; ++m) sum += double(c[m * kRank + r]) * x[m * kIn + j];
      near(level, out[r * kIn + j], factors[r] * sum, 1e-5);
    }
  }
}

FW_TEST(lora_gradient) {
  FW_AT_LEVELS(gradient, check_gradient)
}

static void check_transpose(const char* level, decltype(&baseline::transpose) transpose) {
  constexpr int64_t kRows = kTransposeRows + 21, kColumns = 19, kStride = kRows + 16;
  Numbers in = normal(kRows * kColumns, 1), out(kColumns * kStride, NAN);
  transpose({Element::f32, Element::f32, {in.data(), kColumns, kColumns}, {out.data(), kStride, kRows}, kRows, 2.0}, 0,
            2);
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < kColumns; ++j) near(level, out[j * kStride + i], 2.0 * in[i * kColumns + j], 0);
  }
  if (!std::isnan(out[kRows])) self_test::fail("padding was written", out[kRows], NAN);
}

FW_TEST(lora_transpose) {
  FW_AT_LEVELS(transpose, check_transpose)
}

}  // namespace fastweights::lora
