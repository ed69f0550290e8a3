// A chunk of n tokens of one head: its rows packed, its gates as running products. Every factor is a product of
// decays between two tokens of the chunk, never a quotient, so that no gate can overflow and a decay of zero cuts
// exactly.
#pragma once

#include "core/scratch.h"
#include "linear_attention/product.h"
#include "linear_attention/recurrent.h"

namespace fastweights::linear_attention::FW_LEVEL {

// Longest chunks: short ones do less arithmetic above the diagonal; with a gate per channel the diagonal block has no
// matrix form.
constexpr int64_t kChunk = 32;
constexpr int64_t kChannelChunk = 16;

FW_INLINE int64_t chunk_of(const Problem& p) {
  return p.gate == Gate::channel ? kChannelChunk : kChunk;
}

// Heads whose states fill `bytes`, one at least.
template <typename T>
FW_INLINE int64_t heads_at_once(const Problem& p, int64_t columns, int64_t bytes) {
  const int64_t state = p.K * padded<T>(columns) * int64_t(sizeof(T)), heads = state ? bytes / state : p.HV;
  return heads < 1 ? 1 : heads > p.HV ? p.HV : heads;
}

// f(first task, heads) over the tasks [begin, end), at most `most` heads of one sequence and tile at a time.
template <typename F>
FW_INLINE void for_head_groups(const Problem& p, int64_t begin, int64_t end, int64_t most, const F& f) {
  for (int64_t task = begin; task < end;) {
    int64_t heads = p.HV - task % p.HV;
    heads = heads < end - task ? heads : end - task;
    heads = heads < most ? heads : most;
    f(task, heads);
    task += heads;
  }
}

// Decays below the smallest normal number are zero: what follows would be slow and mean nothing.
template <typename T>
FW_INLINE Vec<T> flush(Vec<T> x) {
  constexpr T tiny = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);
  return x < tiny ? zero<T>() : x;
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
  Row rows[10];
};

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
    T product = T(1);
    for (int64_t i = 0; i < n; ++i) prefix[i] = product *= decay[i];
    total[0] = product;
    product = T(1);
    for (int64_t i = n - 1; i >= 0; --i) {
      suffix[i] = product;
      product *= decay[i];
    }
    scale_rows(n, suffix, k, k_out);
    scale_rows(n, prefix, q, q_in);
  }

  void scale_rows(int64_t n, const T* factor, const T* in, T* out) {
    using ::fastweights::FW_LEVEL::load;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < Kp; j += kLanes<T>) store(out + i * Kp + j, load(in + i * Kp + j) * set1(factor[i]));
    }
  }

  void load_channel_gates(const Problem& p, const Sequence& s, const Task& task, int64_t start, int64_t n) {
    using ::fastweights::FW_LEVEL::load;
    for (int64_t i = 0; i < n; ++i) load_decay(p, s, start + i, task.head, decay + i * Kp);
    for (int64_t j = 0; j < Kp; j += kLanes<T>) {
      Vec<T> product = set1(T(1));
      for (int64_t i = 0; i < n; ++i) {
        product = flush<T>(product * load(decay + i * Kp + j));
        store(prefix + i * Kp + j, product);
        store(q_in + i * Kp + j, load(q + i * Kp + j) * product);
      }
      store(total + j, product);
      product = set1(T(1));
      for (int64_t i = n - 1; i >= 0; --i) {
        store(suffix + i * Kp + j, product);
        store(k_out + i * Kp + j, load(k + i * Kp + j) * product);
        product = flush<T>(product * load(decay + i * Kp + j));
      }
    }
  }
};

// P[i, j] times the decays of tokens j + 1 to i, zero above the diagonal in the vectors that hold it.
template <typename T>
FW_INLINE void decay_triangle(int64_t n, const T* decay, T* P, int64_t ld) {
  constexpr int L = kLanes<T>;
  VecInt<T> lane{};
  for (int x = 0; x < L; ++x) lane[x] = x;
  for (int64_t j = 0; j < n; j += L) {
    Vec<T> w = zero<T>();
    for (int64_t i = j; i < n; ++i) {
      w = flush<T>(w * set1(decay[i]));
      w = lane == VecInt<T>{} + (typename IntOf<T>::type)(i - j) ? set1(T(1)) : w;
      T* at = P + i * ld + j;
      store(at, lane > VecInt<T>{} + (typename IntOf<T>::type)(i - j) ? zero<T>() : load(at) * w);
    }
  }
}

// PT[j, i] = sum over channels of q[i] k[j] times the channel's decays of tokens j + 1 to i, for j <= i. `part` has
// room for a vector per row, a multiple of the lane count of them.
template <typename T>
FW_INLINE void channel_triangle(int64_t n, int64_t Kp, const T* q, const T* k, const T* decay, T* PT, int64_t ld,
                                T* part) {
  constexpr int L = kLanes<T>, W = 4;
  const int64_t np = padded<T>(n);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < np; ++i) store(part + i * L, zero<T>());
    int64_t c = 0;
    for (; c + W * L <= Kp; c += W * L) {
      Vec<T> w[W];
      FW_UNROLL
      for (int x = 0; x < W; ++x) w[x] = load(k + j * Kp + c + x * L);
      for (int64_t i = j; i < n; ++i) {
        Vec<T> sum = load(part + i * L);
        FW_UNROLL
        for (int x = 0; x < W; ++x) {
          if (i > j) w[x] = w[x] * load(decay + i * Kp + c + x * L);
          sum = fma(w[x], load(q + i * Kp + c + x * L), sum);
        }
        store(part + i * L, sum);
      }
    }
    for (; c < Kp; c += L) {
      Vec<T> w = load(k + j * Kp + c);
      for (int64_t i = j; i < n; ++i) {
        if (i > j) w = w * load(decay + i * Kp + c);
        store(part + i * L, fma(w, load(q + i * Kp + c), load(part + i * L)));
      }
    }
    for (int64_t i = j / L * L; i < np; i += L) store(PT + j * ld + i, reduce_each<T>(part + i * L));
  }
}

// What the triangle of the channels passes on: with W[i, j] the channel's decays of tokens j + 1 to i and dP the
// gradient of the weights, dq[i] += sum over j of dP[i, j] k[j] W[i, j] and dk[j] += sum over i of dP[i, j] q[i] W[i,
// j].
template <typename T>
FW_INLINE void channel_triangle_backward(int64_t n, int64_t Kp, const T* q, const T* k, const T* decay, const T* dP,
                                         int64_t ld, T* dq, T* dk) {
  for (int64_t c = 0; c < Kp; c += kLanes<T>) {
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> key = load(k + j * Kp + c);
      Vec<T> w = set1(T(1)), sum = load(dk + j * Kp + c);
      for (int64_t i = j; i < n; ++i) {
        if (i > j) w = flush<T>(w * load(decay + i * Kp + c));
        const Vec<T> weight = w * set1(dP[i * ld + j]);
        store(dq + i * Kp + c, fma(weight, key, load(dq + i * Kp + c)));
        sum = fma(weight, load(q + i * Kp + c), sum);
      }
      store(dk + j * Kp + c, sum);
    }
  }
}

}  // namespace fastweights::linear_attention::FW_LEVEL
