#include "core/probe.h"

#include "core/gemm.h"
#include "core/vmath.h"

namespace fastweights::probe::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

template <typename T>
static Vec<T> apply(Function f, Vec<T> x) {
  switch (f) {
    case Function::exp:
      return exp(x);
    case Function::log:
      return log(x);
    case Function::sigmoid:
      return sigmoid(x);
    case Function::softplus:
      return softplus(x);
    default:
      return tanh(x);
  }
}

template <typename T>
static void map(const MathArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  for (int64_t i = 0; i < a.n; i += kLanes<T>) {
    const int64_t n = a.n - i < kLanes<T> ? a.n - i : kLanes<T>;
    store_as(out + i, apply<T>(a.function, load_as(x + i, n)), n);
  }
}

void math(const MathArgs& a, int64_t, int64_t) noexcept {
  a.element == Element::f64 ? map<double>(a) : map<float>(a);
}

template <typename H>
static void convert_half(const ConvertArgs& a) {
  constexpr int L = kLanes<float>;
  for (int64_t i = 0; i < a.n; i += L) {
    const int64_t n = a.n - i < L ? a.n - i : L;
    if (a.to_float) {
      store_as(static_cast<float*>(a.out) + i, load_as(static_cast<const H*>(a.x) + i, n), n);
    } else {
      store_as(static_cast<H*>(a.out) + i, load_as(static_cast<const float*>(a.x) + i, n), n);
    }
  }
}

void convert(const ConvertArgs& a, int64_t, int64_t) noexcept {
  a.element == Element::bf16 ? convert_half<bfloat16>(a) : convert_half<float16>(a);
}

// Twelve chains hide the latency of the multiply-add on every core of the last decade. The asm hides the factors from
// the optimiser without touching memory: a memory clobber would spill the accumulators and halve the reading.
constexpr int kChains = 12;

void peak(const PeakArgs& a, int64_t, int64_t) noexcept {
  Vec<float> acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = set1(float(i));
  if (a.bf16) {
    Vec<uint32_t> x = set1(0x3f803f80u), y = set1(0x3f003f00u);
    for (int64_t r = 0; r < a.rounds; ++r) {
      FW_UNROLL
      for (int i = 0; i < kChains; ++i) acc[i] = dot2_bf16(acc[i], x, y);
    }
    *a.flops = double(a.rounds) * kChains * kLanes<float> * 4;
  } else {
    const Vec<float> x = set1(0.999f), y = set1(0.001f);
    for (int64_t r = 0; r < a.rounds; ++r) {
      FW_UNROLL
      for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], x, y);
    }
    *a.flops = double(a.rounds) * kChains * kLanes<float> * 2;
  }
  Vec<float> sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum += acc[i];
  *a.sink = reduce_add<float>(sum);
}

void gemm_tile(const GemmArgs& a, int64_t, int64_t) noexcept {
  for (int64_t r = 0; r < a.repeats; ++r) {
    if (a.bf16) {
      gemm_bf16(a.M, a.N, a.K / 2, static_cast<const uint32_t*>(a.A), a.K / 2, static_cast<const uint32_t*>(a.B), a.N,
                a.C, a.N, false);
    } else {
      gemm(a.M, a.N, a.K, static_cast<const float*>(a.A), a.K, int64_t(1), static_cast<const float*>(a.B), a.N, a.C,
           a.N, false);
    }
  }
}

void stream(const StreamArgs& a, int64_t begin, int64_t end) noexcept {
  constexpr int L = kLanes<float>, U = 4;
  Vec<float> sum[U] = {};
  for (int64_t i = begin; i + U * L <= end; i += U * L) {
    FW_UNROLL
    for (int u = 0; u < U; ++u) {
      const Vec<float> x = load(a.x + i + u * L);
      if (a.kind == Stream::read) {
        sum[u] += x;
      } else if (a.kind == Stream::copy) {
        store(a.y + i + u * L, x);
      } else {
        store(a.x + i + u * L, fma(x, set1(0.5f), set1(0.25f)));
      }
    }
  }
  *a.sink = reduce_add<float>(sum[0] + sum[1] + sum[2] + sum[3]);
}

}  // namespace fastweights::probe::FW_LEVEL
