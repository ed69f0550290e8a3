// The columns of one block of GPTQ. Lanes are rows, which know nothing of each other, so every step is vertical.
//
// A column is rounded after all that the columns before it pass on: w_i - sum over j < i of e_j u_ji (+ w_j p_ji).
// These sums are taken when they are needed, not when e_j is known: a tile of columns stays in registers while the
// errors of all columns before it pass by, and nothing is stored but the errors.
#include "quantization/gptq_block.h"

#include "core/product.h"
#include "core/scratch.h"

namespace fastweights::quantization::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

// Columns whose sums are in registers.
constexpr int kTile = 8;

template <typename T>
FW_INLINE Vec<T> round_to_even(Vec<T> v) {
  // Adding 1.5 * 2^(bits of the mantissa) leaves no room for a fraction; codes are smaller than half of it.
  const Vec<T> magic = set1(sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0));
  return (v + magic) - magic;
}

// A strip of `rows` <= lanes rows, transposed: out[j] holds column j. Padded rows are zero.
template <typename T>
static void load_strip(const T* in, int64_t stride, int64_t rows, int64_t C, T* out) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  for (; rows == L && j + L <= C; j += L) {
    Vec<T> r[L];
    FW_UNROLL
    for (int n = 0; n < L; ++n) r[n] = load(in + n * stride + j);
    transpose<T>(r);
    FW_UNROLL
    for (int n = 0; n < L; ++n) store(out + (j + n) * L, r[n]);
  }
  for (; j < C; ++j) {
    for (int n = 0; n < L; ++n) out[j * L + n] = n < rows ? in[n * stride + j] : T(0);
  }
}

template <typename T>
static void store_strip(const T* in, int64_t rows, int64_t C, T* out) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  for (; rows == L && j + L <= C; j += L) {
    Vec<T> r[L];
    FW_UNROLL
    for (int n = 0; n < L; ++n) r[n] = load(in + (j + n) * L);
    transpose<T>(r);
    FW_UNROLL
    for (int n = 0; n < L; ++n) store(out + n * C + j, r[n]);
  }
  for (; j < C; ++j) {
    for (int64_t n = 0; n < rows; ++n) out[n * C + j] = in[j * L + n];
  }
}

// The strip's columns, [C][lanes] each: w holds, in the end, the weights as they were when their turn came.
template <typename T>
struct Strip {
  T *w, *scale, *minimum, *codes, *errors;
};

// sums[n] -= passed_j * along[j, first + n] for all columns j before `first`.
template <typename T, int N>
FW_INLINE void take(const T* passed, const T* along, int64_t stride, int64_t first, Vec<T> (&sums)[N]) {
  for (int64_t j = 0; j < first; ++j) {
    const Vec<T> e = load(passed + j * kLanes<T>);
    const T* row = along + j * stride + first;
    FW_UNROLL
    for (int n = 0; n < N; ++n) sums[n] = sums[n] - e * set1(row[n]);
  }
}

template <typename T, int N>
static void round_tile(const GptqBlockArgs& a, const Strip<T>& s, int64_t first) {
  constexpr int L = kLanes<T>;
  const T *u = static_cast<const T*>(a.u), *p = static_cast<const T*>(a.p);
  const Vec<T> least = set1(T(a.least)), most = set1(T(a.most));
  Vec<T> sums[N];
  FW_UNROLL
  for (int n = 0; n < N; ++n) sums[n] = load(s.w + (first + n) * L);
  take<T, N>(s.errors, u, a.u_stride, first, sums);
  if (p) take<T, N>(s.w, p, a.p_stride, first, sums);
  FW_UNROLL
  for (int n = 0; n < N; ++n) {
    const int64_t i = first + n;
    const Vec<T> w = sums[n], scale = load(s.scale + i * L), minimum = load(s.minimum + i * L);
    const Vec<T> inverse = scale == T(0) ? zero<T>() : T(1) / scale;
    const Vec<T> code = round_to_even<T>(min(max((w - minimum) * inverse, least), most));
    const Vec<T> error = (w - fma(scale, code, minimum)) / set1(u[i * a.u_stride + i]);
    store(s.w + i * L, w);
    store(s.codes + i * L, code);
    store(s.errors + i * L, error);
    FW_UNROLL
    for (int m = n + 1; m < N; ++m) {
      sums[m] = sums[m] - error * set1(u[i * a.u_stride + first + m]);
      if (p) sums[m] = sums[m] - w * set1(p[i * a.p_stride + first + m]);
    }
  }
}

template <typename T>
static void round_rows(const GptqBlockArgs& a, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int64_t size = a.C * L;
  Scratch memory(5 * Scratch::take_bytes<T>(size));
  const Strip<T> s{memory.take<T>(size), memory.take<T>(size), memory.take<T>(size), memory.take<T>(size),
                   memory.take<T>(size)};
  const int64_t stop = end * kRoundRows < a.N ? end * kRoundRows : a.N;
  for (int64_t row = begin * kRoundRows; row < stop; row += L) {
    const int64_t rows = stop - row < L ? stop - row : L;
    load_strip(static_cast<const T*>(a.w) + row * a.w_stride, a.w_stride, rows, a.C, s.w);
    load_strip(static_cast<const T*>(a.scale) + row * a.scale_stride, a.scale_stride, rows, a.C, s.scale);
    load_strip(static_cast<const T*>(a.minimum) + row * a.minimum_stride, a.minimum_stride, rows, a.C, s.minimum);
    int64_t first = 0;
    for (; first + kTile <= a.C; first += kTile) round_tile<T, kTile>(a, s, first);
    for (; first < a.C; ++first) round_tile<T, 1>(a, s, first);
    store_strip(s.codes, rows, a.C, static_cast<T*>(a.codes) + row * a.C);
    store_strip(s.errors, rows, a.C, static_cast<T*>(a.errors) + row * a.C);
  }
}

void gptq_block(const GptqBlockArgs& a, int64_t begin, int64_t end) noexcept {
  a.element == Element::f64 ? round_rows<double>(a, begin, end) : round_rows<float>(a, begin, end);
}

}  // namespace fastweights::quantization::FW_LEVEL
