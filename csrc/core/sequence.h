// The tasks of a recurrence: a sequence, a head and columns of V; their states; what to read ahead.
#pragma once

#include "core/rows.h"

namespace fastweights::FW_LEVEL {

// The tokens of one sequence in the order in which the recurrence visits them.
struct Sequence {
  int64_t batch, first, step, length, slot;

  FW_INLINE Sequence of(const Recurrence& p, int64_t n) {
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

  FW_INLINE Task of(const Recurrence& p, int64_t task) {
    const int64_t head = task % p.HV, tile = task / p.HV % p.tiles, n = task / p.HV / p.tiles;
    const int64_t column = tile * p.tile_width, rest = p.V - column;
    const int64_t width = rest < p.tile_width ? rest : p.tile_width;
    return {n, tile, head, head / (p.HV / p.H), column, width, width + p.normalize};
  }
};

// Heads whose states fill `bytes`, one at least.
template <typename T>
FW_INLINE int64_t heads_at_once(const Recurrence& p, int64_t columns, int64_t bytes) {
  const int64_t state = p.K * padded<T>(columns) * int64_t(sizeof(T)), heads = state ? bytes / state : p.HV;
  return heads < 1 ? 1 : heads > p.HV ? p.HV : heads;
}

// f(first task, heads) over the tasks [begin, end), at most `most` heads of one sequence and tile at a time.
template <typename F>
FW_INLINE void for_head_groups(const Recurrence& p, int64_t begin, int64_t end, int64_t most, const F& f) {
  for (int64_t task = begin; task < end;) {
    int64_t heads = p.HV - task % p.HV;
    heads = heads < end - task ? heads : end - task;
    heads = heads < most ? heads : most;
    f(task, heads);
    task += heads;
  }
}

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

// A kept state, in the layout [slots, HV, K, V + normalize].
template <typename T>
FW_INLINE T* kept_state(void* states, const Recurrence& p, const Task& task, int64_t slot) {
  return static_cast<T*>(states) + (slot * p.HV + task.head) * p.K * (p.V + p.normalize);
}

template <typename T>
FW_INLINE void keep_state(void* states, const Recurrence& p, const Task& task, int64_t slot, const T* S, int64_t ld) {
  const int64_t columns = p.V + p.normalize;
  T* out = kept_state<T>(states, p, task, slot);
  for (int64_t i = 0; i < p.K; ++i, out += columns) {
    store_elements(out + task.column, task.width, S + i * ld);
    if (p.normalize && task.tile == 0) out[p.V] = S[i * ld + task.width];
  }
}

template <typename T>
FW_INLINE void restore_state(const void* states, const Recurrence& p, const Task& task, int64_t slot, T* S,
                             int64_t ld) {
  const int64_t columns = p.V + p.normalize;
  const T* in = kept_state<T>(const_cast<void*>(states), p, task, slot);
  for (int64_t i = 0; i < p.K; ++i, in += columns) {
    load_elements(in + task.column, task.width, T(1), S + i * ld);
    for (int64_t j = padded<T>(task.width); j < ld; ++j) S[i * ld + j] = T(0);
    if (p.normalize) S[i * ld + task.width] = in[p.V];
  }
}

// Pulls the rows of coming tokens towards the cache, those to be written too: one token at each call.
class Ahead {
 public:
  // Tokens [start, start + n) as far as the sequence has them.
  Ahead(const Sequence& sequence, int64_t start, int64_t n)
      : s(sequence),
        first(start),
        left(start < 0              ? 0
             : n < s.length - start ? n
                                    : s.length - start) {}

  // n elements from `column` on of a head's rows; none where the tensor is absent.
  void add(const Rows& r, int64_t head, int64_t column, int64_t n) {
    if (!r.data || left <= 0) return;
    const int64_t size = size_of(r.element);
    rows[count++] = {static_cast<const char*>(r.data) + (s.offset(r, first, head) + column) * size,
                     r.time * s.step * size, n * size};
  }

  void operator()() {
    if (left <= 0) return;
    --left;
    for (int x = 0; x < count; ++x) {
      Row& r = rows[x];
      for (int64_t i = 0; i < r.bytes; i += 64) prefetch(r.at + i);
      r.at += r.step;
    }
  }

 private:
  struct Row {
    const char* at;
    int64_t step, bytes;
  };

  const Sequence& s;
  int64_t first, left;
  int count = 0;
  Row rows[16];
};

}  // namespace fastweights::FW_LEVEL
