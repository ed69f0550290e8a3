// The backward in chunks, from the last to the first. With S the state before a chunk, dS the gradient of the one after
// it, P = tril(q k^T) and dP = tril(do v^T), both with their decays:
//   dq = scale (prefix (do S^T) + dP k)      dk = suffix (v dS^T) + dP^T q      dv = (suffix k) dS + P^T do
//   dS <- total dS + (prefix q)^T do         dg_t = dg_{t+1} + q_t . dq_t - k_t . dk_t,  dg after the chunk: dS . S
// S is kept transposed: do S^T and its own update then need no other layout.
#include "linear_attention/chunk.h"

namespace fastweights::linear_attention::FW_LEVEL {

template <typename T>
class ChunkedBackward {
 public:
  ChunkedBackward(const BackwardArgs& args, int64_t columns, int64_t heads)
      : a(args),
        p(args.p),
        c(chunk_of(p)),
        Kp(padded<T>(p.K)),
        ld(padded<T>(columns)),
        cp(padded<T>(c)),
        Vp(padded<T>(p.V)),
        scratch(bytes(args.p, columns, heads)),
        chunk(p, columns, scratch) {
    for (T*& state : ST) state = scratch.take<T>(ld * Kp);
    dST = scratch.take<T>(ld * Kp);
    dS_of_heads = scratch.take<T>(heads * Kp * ld);
    carry_of_heads = scratch.take<T>(heads * Kp);
    sum_of_heads = scratch.take<T>(heads);
    kT = scratch.take<T>(Kp * cp), vT = scratch.take<T>(ld * cp);
    P = scratch.take<T>(cp * cp), dP = scratch.take<T>(cp * cp);
    G = scratch.take<T>(cp * ld), dv = scratch.take<T>(cp * ld);
    dq = scratch.take<T>(cp * Kp), dk = scratch.take<T>(cp * Kp);
    part = scratch.take<T>(cp * kLanes<T>);
    row = scratch.take<T>(2 * Vp);
  }

  // Heads [first, first + heads) of one sequence and tile.
  void run(int64_t first_task, int64_t heads) {
    const Sequence s = Sequence::of(p, Task::of(p, first_task).n);
    const int64_t segments = (s.length + kSegment - 1) / kSegment;
    for (int64_t h = 0; h < heads; ++h) {
      const Task task = Task::of(p, first_task + h);
      select(h);
      for (int64_t i = p.K * ld; i < Kp * ld; ++i) dS[i] = T(0);
      load_state(a.grad_final, task, p.K, p.HV, p.normalize && task.tile == 0, dS, ld);
      for (int64_t j = 0; j < Kp; ++j) carry[j] = T(0);
      sum_of_heads[h] = T(0);
    }
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      for (int64_t h = 0; h < heads; ++h) {
        const bool wraps = h + 1 == heads;
        next = Task::of(p, first_task + (wraps ? 0 : h + 1));
        next_start = (wraps ? segment - 1 : segment) * kSegment;
        select(h);
        run_segment(s, Task::of(p, first_task + h), segment, segment == segments - 1, sum_of_heads[h]);
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      const Task task = Task::of(p, first_task + h);
      select(h);
      if (p.gate == Gate::head)
        static_cast<T*>(a.dg.data)[task.n * a.dg.batch + partial(task) * a.dg.head] = sum_of_heads[h];
      store_state(a.grad_initial, task, p.K, p.HV, p.normalize, dS, ld);
    }
  }

 private:
  static constexpr int64_t kMostChunks = kSegment / kChannelChunk;

  static size_t bytes(const Problem& p, int64_t columns, int64_t heads) {
    const int64_t c = chunk_of(p), Kp = padded<T>(p.K), ld = padded<T>(columns), cp = padded<T>(c);
    const auto take = [](int64_t n) { return Scratch::take_bytes<T>(n); };
    return Chunk<T>::bytes(p, columns) + (kMostChunks + 2) * take(ld * Kp) + take(heads * Kp * ld) + take(heads * Kp) +
           take(heads) + take(Kp * cp) + take(ld * cp) + 2 * take(cp * cp) + 2 * take(cp * ld) + 2 * take(cp * Kp) +
           take(cp * kLanes<T>) + take(2 * padded<T>(p.V));
  }

  void select(int64_t head) {
    dS = dS_of_heads + head * Kp * ld;
    carry = carry_of_heads + head * Kp;
  }

  // The rows of the segment that comes next, for the time of chunk x of this one.
  Ahead rows_ahead(const Sequence& s, int64_t x) const {
    Ahead ahead(s, next_start + x * c, c);
    ahead.add(p.q, next.key_head, 0, p.K);
    ahead.add(p.k, next.key_head, 0, p.K);
    ahead.add(p.g, next.head, 0, p.gate == Gate::channel ? p.K : 1);
    ahead.add(p.v, next.head, next.column, next.width);
    ahead.add(a.grad_o, next.head, next.column, next.width);
    ahead.add(a.dv, next.head, next.column, next.width);
    ahead.add(a.dq, partial(next), 0, p.K);
    ahead.add(a.dk, partial(next), 0, p.K);
    if (p.gate == Gate::channel) ahead.add(a.dg, partial(next), 0, p.K);
    ahead.add(a.o, next.head, 0, p.V);
    return ahead;
  }

  int64_t partial(const Task& task) const { return task.tile * p.HV + task.head; }

  void run_segment(const Sequence& s, const Task& task, int64_t segment, bool last, T& sum_over_tokens) {
    const int64_t start = segment * kSegment, end = start + kSegment < s.length ? start + kSegment : s.length;
    const int64_t chunks = (end - start + c - 1) / c;
    restore_state(a.states, p, task, s.slot + segment, dST, ld);
    for (int64_t i = p.K * ld; i < Kp * ld; ++i) dST[i] = T(0);
    transpose(Kp, ld, dST, ld, ST[0], Kp);
    const bool final_state = last && p.gate != Gate::none && (a.grad_final.S || a.grad_final.z);
    for (int64_t x = 0; x < chunks - 1 + final_state; ++x) advance_state(s, task, start + x * c, end, ST[x], ST[x + 1]);
    transpose(Kp, ld, dS, ld, dST, Kp);
    if (final_state) inner_products(ST[chunks]);
    for (int64_t x = chunks - 1; x >= 0; --x) {
      const int64_t first = start + x * c, n = end - first < c ? end - first : c;
      run_chunk(s, task, first, n, ST[x], sum_over_tokens, rows_ahead(s, x));
    }
  }

  void advance_state(const Sequence& s, const Task& task, int64_t start, int64_t end, const T* before, T* after) {
    const int64_t n = end - start < c ? end - start : c;
    chunk.load(p, s, task, start, n, false);
    const Left<T> values{chunk.v, 1, ld};
    const Right<T> keys{chunk.k_out, Kp};
    if (p.gate == Gate::channel) {
      update<T, By::columns>(ld, Kp, n, chunk.total, 1, values, keys, before, after, Kp);
    } else {
      update<T>(ld, Kp, n, chunk.total, 0, values, keys, before, after, Kp);
    }
  }

  // carry = dS . S per channel; with a scalar gate their sum is in carry[0].
  void inner_products(const T* state) {
    constexpr int L = kLanes<T>;
    T total = T(0);
    for (int64_t j = 0; j < Kp; j += L) {
      Vec<T> sum = zero<T>();
      for (int64_t i = 0; i < ld; ++i) sum = fma(load(state + i * Kp + j), load(dST + i * Kp + j), sum);
      store(carry + j, sum);
      total += reduce_add<T>(sum);
    }
    if (p.gate != Gate::channel) carry[0] = total;
  }

  void run_chunk(const Sequence& s, const Task& task, int64_t start, int64_t n, const T* state, T& sum_over_tokens,
                 Ahead ahead) {
    const bool channel = p.gate == Gate::channel, scalar = !channel && p.gate != Gate::none;
    chunk.load(p, s, task, start, n, true);
    if (channel) {
      channel_triangle(n, Kp, chunk.q, chunk.k, chunk.decay, P, cp, part);
    } else {
      transpose(padded<T>(n), Kp, chunk.k, Kp, kT, cp);
      triangle<T>(n, p.K, {chunk.q, Kp, 1}, {kT, cp}, P, cp);
      if (scalar) decay_triangle(n, chunk.decay, P, cp);
    }
    // Weights of the earlier tokens in row i, and their transpose.
    const Left<T> weights = channel ? Left<T>{P, 1, cp} : Left<T>{P, cp, 1};
    load_gradients(s, task, start, n, state, weights);

    transpose(padded<T>(n), ld, chunk.v, ld, vT, cp);
    triangle<T>(n, task.columns, {G, ld, 1}, {vT, cp}, dP, cp);
    if (channel) {
      scaled_product<T>(n, Kp, task.columns, {G, ld, 1}, {state, Kp}, chunk.prefix, dq, Kp, ahead);
      scaled_product<T>(n, Kp, task.columns, {chunk.v, ld, 1}, {dST, Kp}, chunk.suffix, dk, Kp, ahead);
      channel_triangle_backward(n, Kp, chunk.q, chunk.k, chunk.decay, dP, cp, dq, dk);
    } else {
      if (scalar) decay_triangle(n, chunk.decay, dP, cp);
      read_out<T>(n, Kp, task.columns, {G, ld, 1}, {state, Kp}, scalar ? chunk.prefix : nullptr, {dP, cp, 1},
                  {chunk.k, Kp}, dq, Kp, ahead);
      read_out<T, Triangle::upper>(n, Kp, task.columns, {chunk.v, ld, 1}, {dST, Kp}, scalar ? chunk.suffix : nullptr,
                                   {dP, 1, cp}, {chunk.q, Kp}, dk, Kp, ahead);
    }
    read_out<T, Triangle::upper>(n, ld, p.K, {chunk.k_out, Kp, 1}, {dS, ld}, nullptr, {P, weights.column, weights.row},
                                 {G, ld}, dv, ld, ahead);
    update<T>(p.K, ld, n, chunk.total, channel, {chunk.q_in, 1, Kp}, {G, ld}, dS, dS, ld, ahead);

    for (int64_t i = 0; i < n; ++i) {
      store_row(a.dk, s.offset(a.dk, start + i, partial(task)), p.K, dk + i * Kp);
      store_row(a.dv, s.offset(a.dv, start + i, task.head) + task.column, task.width, dv + i * ld);
    }
    if (channel) {
      channel_gate_gradients(s, task, start, n);
    } else if (scalar) {
      gate_gradients(s, task, start, n, sum_over_tokens);
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < Kp; j += kLanes<T>) store(dq + i * Kp + j, load(dq + i * Kp + j) * set1(T(p.scale)));
      store_row(a.dq, s.offset(a.dq, start + i, partial(task)), p.K, dq + i * Kp);
    }
    if (start == 0) return;
    transpose(Kp, ld, dS, ld, dST, Kp);
    if (p.gate != Gate::none) inner_products(state);
  }

  // G: the gradient of the numerator and the denominator, which is the sum of a row's weights.
  void load_gradients(const Sequence& s, const Task& task, int64_t start, int64_t n, const T* state, Left<T> weights) {
    for (int64_t i = 0; i < n; ++i) {
      T denominator = T(1);
      if (p.normalize) {
        denominator = dot(chunk.q_in + i * Kp, state + task.width * Kp, Kp) + T(p.eps);
        for (int64_t j = 0; j <= i; ++j) denominator += weights.at(i)[j * weights.column];
      }
      load_output_gradient(a, s, task, start + i, denominator, row, G + i * ld, ld);
    }
  }

  void gate_gradients(const Sequence& s, const Task& task, int64_t start, int64_t n, T& sum_over_tokens) {
    T gradient = carry[0];
    for (int64_t i = n - 1; i >= 0; --i) {
      gradient += dot(chunk.q + i * Kp, dq + i * Kp, Kp) - dot(chunk.k + i * Kp, dk + i * Kp, Kp);
      // The identity leaves a rounding error where the exact gradient, exp(g) times something, is zero.
      const T exact = chunk.decay[i] == T(0) ? T(0) : gradient;
      if (p.gate == Gate::token) static_cast<T*>(a.dg.data)[s.offset(a.dg, start + i, partial(task))] = exact;
      sum_over_tokens += exact;
    }
  }

  void channel_gate_gradients(const Sequence& s, const Task& task, int64_t start, int64_t n) {
    for (int64_t i = n - 1; i >= 0; --i) {
      for (int64_t j = 0; j < Kp; j += kLanes<T>) {
        const int64_t at = i * Kp + j;
        const Vec<T> gradient =
            load(carry + j) + load(chunk.q + at) * load(dq + at) - load(chunk.k + at) * load(dk + at);
        store(carry + j, gradient);
        store(kT + j, load(chunk.decay + at) == zero<T>() ? zero<T>() : gradient);
      }
      store_row(a.dg, s.offset(a.dg, start + i, partial(task)), p.K, kT);
    }
  }

  const BackwardArgs& a;
  const Problem& p;
  const int64_t c, Kp, ld, cp, Vp;
  Scratch scratch;
  Chunk<T> chunk;
  T* ST[kMostChunks + 1];
  T *dST, *dS_of_heads, *carry_of_heads, *sum_of_heads, *dS, *carry;
  Task next;
  int64_t next_start;
  T *kT, *vT, *P, *dP, *G, *dv, *dq, *dk, *part, *row;
};

template <typename T>
static void backward_tasks(const BackwardArgs& a, int64_t begin, int64_t end) {
  if (a.p.form == Form::recurrent) {
    for (int64_t task = begin; task < end; ++task) recurrent_backward<T>(a, task);
    return;
  }
  const int64_t columns = a.p.tile_width + a.p.normalize;
  // The gradients of states of the heads that are worked on in turn share the second-level cache with what a segment
  // needs besides.
  const int64_t at_once = heads_at_once<T>(a.p, columns, a.p.cache / 4);
  ChunkedBackward<T> chunked(a, columns, at_once);
  for_head_groups(a.p, begin, end, at_once, [&](int64_t task, int64_t heads) { chunked.run(task, heads); });
}

void backward(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  if (a.p.q.element == Element::f64) {
    backward_tasks<double>(a, begin, end);
  } else {
    backward_tasks<float>(a, begin, end);
  }
}

}  // namespace fastweights::linear_attention::FW_LEVEL
