// The update of few rows: A and B are read once, as they lie, by all threads. The bits are those of update.cpp.
#include "lora/shrink.h"
#include "lora/transpose.h"

namespace fastweights::lora::FW_LEVEL {

template <typename S>
static void shrink_ranks(const FewArgs& a, const RanksTask& t) {
  using T = Compute<S>;
  const S* in[kFewRows];
  T* c[kFewRows];
  uint64_t keys[kFewRows] = {};
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t m = row_number(a.order, t.first + i);
    in[i] = row_of<const S>(a.in, m), c[i] = row_of<T>(a.c, m) + t.column;
    if (a.in_dropout.on) keys[i] = row_key(a.in_dropout, m);
  }
  const T* const* down = reinterpret_cast<const T* const*>(a.down + t.rank);
  shrink(in, down, t.count, t.ranks, a.in.columns, a.in_dropout, keys, c);
}

template <typename S>
static void expand_term(const FewArgs& a, const OutputsTask& t, const Term& term) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  static_assert(kFewOutputs % L == 0);
  Scratch scratch(Scratch::take_bytes<T>(term.ranks * kFewOutputs) + Scratch::take_bytes<T>(t.count * term.ranks) +
                  Scratch::take_bytes<T>(t.count * kFewOutputs));
  T* up = scratch.take<T>(term.ranks * kFewOutputs);
  T* c = scratch.take<T>(t.count * term.ranks);
  T* sums = scratch.take<T>(t.count * kFewOutputs);
  for (int64_t i = 0; i < term.up_count; ++i) {
    const Up& u = term.ups[i];
    const int64_t width = u.b.columns;
    with_element(u.element, [&]<typename B>(B) {
      if constexpr (sizeof(Compute<B>) == sizeof(T)) {
        const Matrix rows = {row_of<B>(u.b, t.row), u.b.stride, width};
        const Matrix columns = {up + u.rank * kFewOutputs, kFewOutputs, t.columns};
        transpose_rows<B, T>({u.element, a.element, rows, columns, t.columns, u.factor}, 0, t.columns);
      }
    });
  }
  for (int64_t i = 0; i < t.count; ++i) {
    const T* row = row_of<const T>(a.c, row_number(a.order, t.first + i)) + term.column;
    __builtin_memcpy(c + i * term.ranks, row, size_t(term.ranks) * sizeof(T));
  }
  const int64_t lanes = (t.columns + L - 1) / L * L;
  gemm<T>(t.count, lanes, term.ranks, c, term.ranks, 1, up, kFewOutputs, sums, kFewOutputs, false);
  for (int64_t i = 0; i < t.count; ++i) {
    S* out = row_of<S>(a.out, row_number(a.order, t.first + i)) + t.begin;
    for_vectors<T>(t.columns, [&](int64_t j, auto part) {
      store_as(out + j, load(sums + i * kFewOutputs + j) + load_as(out + j, part), part);
    });
  }
}

void shrink_few(const FewArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.element, [&]<typename S>(S) {
    for (int64_t task = begin; task < end; ++task) shrink_ranks<S>(a, a.ranks[task]);
  });
}

void expand_few(const FewArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.element, [&]<typename S>(S) {
    for (int64_t task = begin; task < end; ++task) {
      const OutputsTask& t = a.outputs[task];
      for (int64_t i = 0; i < t.term_count; ++i) expand_term<S>(a, t, t.terms[i]);
    }
  });
}

}  // namespace fastweights::lora::FW_LEVEL
