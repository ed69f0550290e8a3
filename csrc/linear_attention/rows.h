// Rows and states between tensors and the kernels' own memory, where rows are in the type of the arithmetic and padded
// with zeros to whole vectors.
#pragma once

#include "core/vec.h"
#include "core/vmath.h"
#include "linear_attention/kernel.h"

namespace fastweights::linear_attention::FW_LEVEL {
using namespace ::fastweights::FW_LEVEL;

template <typename T>
FW_INLINE int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

FW_INLINE int64_t size_of(Element e) {
  return e == Element::f64 ? 8 : e == Element::f32 ? 4 : 2;
}

template <typename S>
FW_INLINE void load_elements(const S* in, int64_t n, Compute<S> factor, Compute<S>* out) {
  constexpr int L = kLanes<Compute<S>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(out + i, load_as(in + i) * factor);
  if (i < n) store(out + i, load_as(in + i, n - i) * factor);
}

template <typename S>
FW_INLINE void store_elements(S* out, int64_t n, const Compute<S>* in) {
  constexpr int L = kLanes<Compute<S>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store_as(out + i, load(in + i));
  if (i < n) store_as(out + i, load(in + i), n - i);
}

// out[0, padded(n)) = factor * row, zeros behind n.
template <typename T>
FW_INLINE void load_row(const Rows& r, int64_t offset, int64_t n, T factor, T* out) {
  if constexpr (sizeof(T) == sizeof(double)) {
    load_elements(static_cast<const double*>(r.data) + offset, n, factor, out);
  } else if (r.element == Element::f32) {
    load_elements(static_cast<const float*>(r.data) + offset, n, factor, out);
  } else if (r.element == Element::bf16) {
    load_elements(static_cast<const bfloat16*>(r.data) + offset, n, factor, out);
  } else {
    load_elements(static_cast<const float16*>(r.data) + offset, n, factor, out);
  }
}

template <typename T>
FW_INLINE void store_row(const Rows& r, int64_t offset, int64_t n, const T* in) {
  if constexpr (sizeof(T) == sizeof(double)) {
    store_elements(static_cast<double*>(r.data) + offset, n, in);
  } else if (r.element == Element::f32) {
    store_elements(static_cast<float*>(r.data) + offset, n, in);
  } else if (r.element == Element::bf16) {
    store_elements(static_cast<bfloat16*>(r.data) + offset, n, in);
  } else {
    store_elements(static_cast<float16*>(r.data) + offset, n, in);
  }
}

// The tokens of one sequence in the order in which the recurrence visits them.
struct Sequence {
  int64_t batch, first, step, length, slot;

  FW_INLINE Sequence of(const Problem& p, int64_t n) {
    const int64_t start = p.starts ? p.starts[n] : 0, end = p.starts ? p.starts[n + 1] : p.T;
    const int64_t before = p.starts ? start : n * p.T;
    return {p.starts ? 0 : n, p.reverse ? end - 1 : start, p.reverse ? -1 : 1, end - start, before / kSegment + n};
  }
  int64_t offset(const Rows& r, int64_t i, int64_t head) const {
    return batch * r.batch + (first + i * step) * r.time + head * r.head;
  }
};

// One task: a value head of a sequence and the columns of V that it does.
struct Task {
  int64_t n, tile, head, key_head, column, width, columns;  // columns: width, and one for the normaliser

  FW_INLINE Task of(const Problem& p, int64_t task) {
    const int64_t head = task % p.HV, tile = task / p.HV % p.tiles, n = task / p.HV / p.tiles;
    const int64_t column = tile * p.tile_width, rest = p.V - column;
    const int64_t width = rest < p.tile_width ? rest : p.tile_width;
    return {n, tile, head, head / (p.HV / p.H), column, width, width + p.normalize};
  }
};

// The columns [column, column + width) of a state and, behind them, its z; zeros where it is absent.
template <typename T>
FW_INLINE void load_state(const States& s, const Task& task, int64_t K, int64_t HV, bool normalize, T* out,
                          int64_t ld) {
  for (int64_t i = 0; i < K; ++i) {
    T* row = out + i * ld;
    for (int64_t j = 0; j < ld; ++j) row[j] = T(0);
    if (s.S) {
      const T* in =
          static_cast<const T*>(s.S) + task.n * s.sequence + task.head * s.head + i * s.key + task.column * s.value;
      for (int64_t j = 0; j < task.width; ++j) row[j] = in[j * s.value];
    }
    if (normalize && s.z) row[task.width] = static_cast<const T*>(s.z)[(task.n * HV + task.head) * K + i];
  }
}

template <typename T>
FW_INLINE void store_state(const States& s, const Task& task, int64_t K, int64_t HV, bool normalize, const T* in,
                           int64_t ld) {
  for (int64_t i = 0; i < K; ++i) {
    const T* row = in + i * ld;
    if (s.S) {
      T* out = static_cast<T*>(s.S) + task.n * s.sequence + task.head * s.head + i * s.key + task.column * s.value;
      for (int64_t j = 0; j < task.width; ++j) out[j * s.value] = row[j];
    }
    if (normalize && s.z && task.tile == 0) static_cast<T*>(s.z)[(task.n * HV + task.head) * K + i] = row[task.width];
  }
}

// A kept state, in the layout of ForwardArgs::states.
template <typename T>
FW_INLINE T* kept_state(void* states, const Problem& p, const Task& task, int64_t slot) {
  return static_cast<T*>(states) + (slot * p.HV + task.head) * p.K * (p.V + p.normalize);
}

template <typename T>
FW_INLINE void keep_state(void* states, const Problem& p, const Task& task, int64_t slot, const T* S, int64_t ld) {
  const int64_t columns = p.V + p.normalize;
  T* out = kept_state<T>(states, p, task, slot);
  for (int64_t i = 0; i < p.K; ++i, out += columns) {
    store_elements(out + task.column, task.width, S + i * ld);
    if (p.normalize && task.tile == 0) out[p.V] = S[i * ld + task.width];
  }
}

template <typename T>
FW_INLINE void restore_state(const void* states, const Problem& p, const Task& task, int64_t slot, T* S, int64_t ld) {
  const int64_t columns = p.V + p.normalize;
  const T* in = kept_state<T>(const_cast<void*>(states), p, task, slot);
  for (int64_t i = 0; i < p.K; ++i, in += columns) {
    load_elements(in + task.column, task.width, T(1), S + i * ld);
    for (int64_t j = padded<T>(task.width); j < ld; ++j) S[i * ld + j] = T(0);
    if (p.normalize) S[i * ld + task.width] = in[p.V];
  }
}

// exp of the gates of token i: [padded(K)] with a gate per channel, one number otherwise.
template <typename T>
FW_INLINE void load_decay(const Problem& p, const Sequence& s, int64_t i, int64_t head, T* out) {
  if (p.gate == Gate::channel) {
    constexpr int L = kLanes<T>;
    load_row(p.g, s.offset(p.g, i, head), p.K, T(1), out);
    for (int64_t j = 0; j < p.K; j += L) store(out + j, exp(load(out + j)));
  } else {
    out[0] = p.gate == Gate::none ? T(1) : exp(static_cast<const T*>(p.g.data)[s.offset(p.g, i, head)]);
  }
}

template <typename T>
FW_INLINE T dot(const T* a, const T* b, int64_t n) {
  Vec<T> sum = zero<T>();
  for (int64_t j = 0; j < n; j += kLanes<T>) sum = fma(load(a + j), load(b + j), sum);
  return reduce_add<T>(sum);
}

}  // namespace fastweights::linear_attention::FW_LEVEL
