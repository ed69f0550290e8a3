// A chunk of n tokens of one head: its rows packed, its gates as running products. Every factor is a product of
// decays between two tokens of the chunk, never a quotient, so that no gate can overflow and a decay of zero cuts
// exactly.
#pragma once

#include "core/decay.h"
#include "core/scratch.h"
#include "linear_attention/recurrent.h"

namespace fastweights::linear_attention::FW_LEVEL {

// Longest chunks: short ones do less arithmetic above the diagonal; with a gate per channel the diagonal block has no
// matrix form.
constexpr int64_t kChunk = 32;
constexpr int64_t kChannelChunk = 16;

FW_INLINE int64_t chunk_of(const Problem& p) {
  return p.gate == Gate::channel ? kChannelChunk : kChunk;
}

template <typename T>
struct Chunk {
  int64_t Kp, ld;  // padded K; padded columns of v
  T *q, *k, *v;    // rows: q with the scale, v with the normaliser's ones
  // Per token, or with a gate per channel per token and channel (rows of Kp): the decay of the token, the decays from
  // the chunk's start through it, and after it to the chunk's end.
  T *decay, *prefix, *suffix;
  T *q_in, *k_out;  // q times prefix, k times suffix; without a gate q and k themselves
  T* total;         // the decay of the whole chunk: one number, or per channel

  static size_t bytes(const Problem& p, int64_t columns) {
    const int64_t c = chunk_of(p), Kp = padded<T>(p.K), per_token = p.gate == Gate::channel ? Kp : 1;
    return 4 * Scratch::take_bytes<T>(c * Kp) + Scratch::take_bytes<T>(c * padded<T>(columns)) +
           3 * Scratch::take_bytes<T>(c * per_token + kLanes<T>) + Scratch::take_bytes<T>(Kp);
  }

  Chunk(const Problem& p, int64_t columns, Scratch& scratch) {
    const int64_t c = chunk_of(p);
    Kp = padded<T>(p.K), ld = padded<T>(columns);
    const bool channel = p.gate == Gate::channel;
    const int64_t per_token = channel ? Kp : 1;
    q = scratch.take<T>(c * Kp), k = scratch.take<T>(c * Kp);
    v = scratch.take<T>(c * ld);
    decay = scratch.take<T>(c * per_token + kLanes<T>);
    prefix = scratch.take<T>(c * per_token + kLanes<T>);
    suffix = scratch.take<T>(c * per_token + kLanes<T>);
    T *scaled_q = scratch.take<T>(c * Kp), *scaled_k = scratch.take<T>(c * Kp);
    q_in = p.gate == Gate::none ? q : scaled_q;
    k_out = p.gate == Gate::none ? k : scaled_k;
    total = scratch.take<T>(Kp);
  }

  // Tokens [start, start + n), the queries too unless only the state is to be advanced. Rows of k and v from n on up
  // to a whole vector are zero, for their transposes.
  void load(const Problem& p, const Sequence& s, const Task& task, int64_t start, int64_t n, bool queries) {
    for (int64_t i = 0; i < n; ++i) {
      if (queries) load_row(p.q, s.offset(p.q, start + i, task.key_head), p.K, T(p.scale), q + i * Kp);
      load_row(p.k, s.offset(p.k, start + i, task.key_head), p.K, T(1), k + i * Kp);
      load_value(p, s, task, start + i, v + i * ld, ld);
    }
    for (int64_t i = n * Kp; i < padded<T>(n) * Kp; ++i) k[i] = T(0);
    for (int64_t i = n * ld; i < padded<T>(n) * ld; ++i) v[i] = T(0);
    if (p.gate == Gate::channel) {
      load_channel_gates(p, s, task, start, n);
    } else if (p.gate != Gate::none) {
      load_gates(p, s, task, start, n);
    } else {
      total[0] = T(1);
    }
  }

 private:
  void load_gates(const Problem& p, const Sequence& s, const Task& task, int64_t start, int64_t n) {
    const T* g = static_cast<const T*>(p.g.data);
    for (int64_t i = 0; i < n; ++i) decay[i] = g[s.offset(p.g, start + i, task.head)];
    for (int64_t i = n; i < padded<T>(n); ++i) decay[i] = T(0);
    for (int64_t i = 0; i < n; i += kLanes<T>) store(decay + i, exp(::fastweights::FW_LEVEL::load(decay + i)));
    total[0] = running_products(n, decay, prefix, suffix);
    scale_rows(n, Kp, suffix, k, k_out);
    scale_rows(n, Kp, prefix, q, q_in);
  }

  void load_channel_gates(const Problem& p, const Sequence& s, const Task& task, int64_t start, int64_t n) {
    for (int64_t i = 0; i < n; ++i) load_decay(p, s, start + i, task.head, decay + i * Kp);
    running_products(n, Kp, decay, prefix, suffix, total);
    scale_elements(n, Kp, suffix, k, k_out);
    scale_elements(n, Kp, prefix, q, q_in);
  }
};

}  // namespace fastweights::linear_attention::FW_LEVEL
