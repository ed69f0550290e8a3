// Rows of x as the matmul kernels want them: normalised or gated if asked, then quantized to int8 per 32 inputs (or
// kept as they are), in panels of rows. A row's result depends on that row alone.
#include "core/element.h"
#include "core/scratch.h"
#include "core/tail.h"
#include "core/vmath.h"
#include "quantization/line.h"

namespace fastweights::quantization::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

// The row as T, `gated` or normalised, zero from K to Kp.
template <typename S, typename T = Compute<S>>
static void load_row(const ActivationArgs& a, int64_t m, T* row, int64_t Kp) {
  constexpr int L = kLanes<T>;
  const S* x = static_cast<const S*>(a.x) + m * a.x_stride;
  for_vectors<T>(a.K, [&](int64_t k, auto part) __attribute__((always_inline)) {
    Vec<T> v = load_as(x + k, part);
    if (a.prologue.gated) v = v * sigmoid(v) * load_as(x + a.K + k, part);
    store_as(row + k, v, part);
  });
  for (int64_t k = a.K; k < Kp; ++k) row[k] = 0;
  if (!a.prologue.norm_weight) return;

  Vec<T> squares = zero<T>();
  for (int64_t k = 0; k < Kp; k += L) squares = fma(load(row + k), load(row + k), squares);
  const T factor = reciprocal_root(reduce_add<T>(squares) / T(a.K) + T(a.prologue.norm_eps));
  for (int64_t k = 0; k < a.K; ++k) row[k] *= factor * T(a.prologue.norm_weight[k]);
}

// B values to int8; returns the scale, and the sum of the codes through `sum`. A block that holds an infinity or
// NaN gets the scale NaN, so that the outputs say so.
template <int B, typename T>
FW_INLINE float quantize_block(const T* x, int8_t* codes, int32_t* sum) {
  constexpr int L = kLanes<T>;
  using Int = typename IntOf<T>::type;
  Vec<T> most = zero<T>(), poison = zero<T>();
  FW_UNROLL
  for (int k = 0; k < B; k += L) {
    const Vec<T> v = load(x + k);
    most = max(abs(v), most);
    poison += v * T(0);
  }
  const T absmax = reduce_max<T>(most);
  const bool finite = reduce_add<T>(poison) == T(0);
  // Below this the inverse would overflow; such values are zero beside anything else that a model computes.
  const T inverse = finite && absmax > T(1e-36) ? T(127) / absmax : T(0);
  const T magic = sizeof(T) == 4 ? T(12582912) : T(6755399441055744);  // 1.5 * 2^(mantissa bits): rounds half to even
  Vec<Int> total = zero<Int>();
  FW_UNROLL
  for (int k = 0; k < B; k += L) {
    // The bound also keeps product and sum two roundings, so that every level gives the same codes.
    const Vec<T> scaled = min(finite ? load(x + k) * inverse : zero<T>(), set1(T(127)));
    const Vec<Int> q = __builtin_convertvector((scaled + magic) - magic, Vec<Int>);
    total += q;
    *reinterpret_cast<typename VecOf<int8_t, L>::unaligned*>(codes + k) =
        __builtin_convertvector(q, typename VecOf<int8_t, L>::type);
  }
  *sum = int32_t(reduce_add<Int>(total));
  if (!finite) return __builtin_nanf("");
  return inverse > 0 ? float(absmax / T(127)) : 0.0f;
}

template <int B, typename T>
static void emit_codes(const ActivationArgs& a, const T* row, int64_t panel, int64_t r, int64_t R) {
  const int64_t blocks = a.group / B;
  for (int64_t g = 0; g < a.groups; ++g, row += a.group) {
    int8_t* codes = a.out.codes + panel_offset(a.M, a.groups, panel, g, a.group);
    const int64_t first = panel_offset(a.M, a.groups, panel, g, blocks);
    float* scales = a.out.scales + first;
    int32_t* code_sums = a.out.code_sums + first;
    float group_sum = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) {
      alignas(64) int8_t q[B];
      int32_t sum;
      const float scale = quantize_block<B>(row + b * B, q, &sum);
      for (int64_t i = 0; i < B / 4; ++i) __builtin_memcpy(codes + ((b * (B / 4) + i) * R + r) * 4, q + 4 * i, 4);
      scales[b * R + r] = scale;
      code_sums[b * R + r] = sum;
      group_sum += scale * float(sum);
    }
    static_cast<float*>(a.out.sums)[panel_offset(a.M, a.groups, panel, g, 1) + r] = group_sum;
  }
}

template <typename T>
static void emit_values(const ActivationArgs& a, const T* row, int64_t panel, int64_t r, int64_t R) {
  constexpr int L = kLanes<T>;
  for (int64_t g = 0; g < a.groups; ++g) {
    const T* x = row + g * a.group;
    T* out = static_cast<T*>(a.out.values) + panel_offset(a.M, a.groups, panel, g, a.group);
    for (int64_t t = 0; t < 4; ++t) {
      for (int64_t j = 0; j < a.group / 4; ++j) out[(t * (a.group / 4) + j) * R + r] = x[4 * j + t];
    }
    Vec<T> sum = zero<T>();
    for (int64_t k = 0; k < a.group; k += L) sum += load(x + k);
    static_cast<T*>(a.out.sums)[panel_offset(a.M, a.groups, panel, g, 1) + r] = reduce_add<T>(sum);
  }
}

template <typename S>
static void pack_rows(const ActivationArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const int64_t Kp = a.groups * a.group;
  const int64_t panel_rows = a.out.quantized ? kIntRows : kFloatRows;
  const bool as_it_is = a.K == Kp && !a.prologue.norm_weight && !a.prologue.gated;
  Scratch scratch(Scratch::take_bytes<T>(Kp));
  T* row = scratch.take<T>(Kp);
  for (int64_t m = begin; m < end; ++m) {
    const int64_t r = m % panel_rows, panel = m - r;
    const int64_t R = a.M - panel < panel_rows ? a.M - panel : panel_rows;
    const T* values = row;
    if constexpr (sizeof(S) == sizeof(T)) {
      if (as_it_is) values = static_cast<const T*>(a.x) + m * a.x_stride;
    }
    if (values == row) load_row<S>(a, m, row, Kp);
    if (!a.out.quantized) {
      emit_values<T>(a, values, panel, r, R);
    } else if (a.group < kBlock) {
      emit_codes<16>(a, values, panel, r, R);
    } else {
      emit_codes<int(kBlock)>(a, values, panel, r, R);
    }
  }
}

void pack_activations(const ActivationArgs& a, int64_t begin, int64_t end) noexcept {
  begin *= kSourceRows;
  end = end * kSourceRows < a.M ? end * kSourceRows : a.M;
  with_element(a.element, [&]<typename S>(S) { pack_rows<S>(a, begin, end); });
}

}  // namespace fastweights::quantization::FW_LEVEL
