// The backward in chunks, from the last to the first. With S the state before a chunk, dS the gradient of the one after
// it, L, P as in the forward, N its corrections, which it kept, and dP = tril(do N^T), dL = strict tril(D N^T) with
// their decays:
//   D = P^T do + (suffix k) dS + L^T D      du = D
//   dq = prefix (do S^T) + dP k             de = prefix (D S^T) + dL k        dk = suffix (N dS^T) + dP^T q + dL^T e
//   dS <- total dS + (prefix q)^T do + (prefix e)^T D
//   dg_t = dg_{t+1} + q_t . dq_t + e_t . de_t - k_t . dk_t,  dg after the chunk: dS . (the state after it)
// S is needed as its transpose only.
#include "delta_rule/gradients.h"

namespace fastweights::delta_rule::FW_LEVEL {

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
        scratch(bytes(args.p, columns, heads)),
        chunk(p, columns, scratch),
        rows(p, columns, scratch) {
    S = scratch.take<T>(Kp * ld), dST = scratch.take<T>(ld * Kp);
    for (T*& transposed : ST) transposed = scratch.take<T>(ld * Kp);
    dS_of_heads = scratch.take<T>(heads * Kp * ld);
    sums_of_heads = scratch.take<T>(heads * GateSums<T>::size(Kp));
    NT = scratch.take<T>(ld * cp);
    L = scratch.take<T>(cp * cp), P = scratch.take<T>(cp * cp);
    dL = scratch.take<T>(cp * cp), dP = scratch.take<T>(cp * cp);
    N = scratch.take<T>(cp * ld), G = scratch.take<T>(cp * ld), D = scratch.take<T>(cp * ld);
    dq = scratch.take<T>(cp * Kp), de = scratch.take<T>(cp * Kp), dk = scratch.take<T>(cp * Kp);
  }

  // Heads [first, first + heads) of one sequence and tile.
  void run(int64_t first_task, int64_t heads) {
    const Sequence s = Sequence::of(p, Task::of(p, first_task).n);
    const int64_t segments = (s.length + kSegment - 1) / kSegment;
    for (int64_t h = 0; h < heads; ++h) {
      select(h);
      for (int64_t i = p.K * ld; i < Kp * ld; ++i) dS[i] = T(0);
      load_state(a.grad_final, Task::of(p, first_task + h), p.K, p.HV, false, dS, ld);
      sums.clear();
    }
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      for (int64_t h = 0; h < heads; ++h) {
        const bool wraps = h + 1 == heads;
        next = Task::of(p, first_task + (wraps ? 0 : h + 1));
        next_start = (wraps ? segment - 1 : segment) * kSegment;
        select(h);
        run_segment(s, Task::of(p, first_task + h), segment, segment + 1 == segments);
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      const Task task = Task::of(p, first_task + h);
      select(h);
      sums.store(a, task);
      store_state(a.grad_initial, task, p.K, p.HV, false, dS, ld);
    }
  }

 private:
  static constexpr int64_t kMostChunks = kSegment / kChannelChunk;

  static size_t bytes(const Problem& p, int64_t columns, int64_t heads) {
    const int64_t Kp = padded<T>(p.K), ld = padded<T>(columns), cp = padded<T>(chunk_of(p));
    const auto take = [](int64_t n) { return Scratch::take_bytes<T>(n); };
    return Chunk<T>::bytes(p, columns) + RowGradients<T>::bytes(p, columns) + (kMostChunks + 3) * take(Kp * ld) +
           take(heads * Kp * ld) + take(heads * GateSums<T>::size(Kp)) + take(ld * cp) + 4 * take(cp * cp) +
           3 * take(cp * ld) + 3 * take(cp * Kp);
  }

  void select(int64_t head) {
    dS = dS_of_heads + head * Kp * ld;
    sums = GateSums<T>(sums_of_heads + head * GateSums<T>::size(Kp), Kp);
  }

  // The rows of the segment that comes next, for the time of chunk x of this one.
  Ahead rows_ahead(const Sequence& s, int64_t x) const {
    const int64_t head = next.tile * p.HV + next.head, gate = p.gate == Gate::channel ? p.K : 1;
    Ahead ahead(s, next_start + x * c, c);
    const auto keys = [&](const Rows& r, int64_t of) { ahead.add(r, of, 0, p.K); };
    const auto values = [&](const Rows& r) { ahead.add(r, next.head, next.column, next.width); };
    keys(p.q, next.key_head), keys(p.k, next.key_head), keys(p.erase, next.head);
    values(p.v), values(p.write), values(a.corrections), values(a.grad_o), values(a.dv), values(a.dwrite);
    keys(a.dq, head), keys(a.dk, head), keys(a.derase, head);
    ahead.add(p.g, next.head, 0, gate);
    if (p.gate == Gate::channel) keys(a.dg, head);
    ahead.add(p.beta, next.head, 0, 1);
    return ahead;
  }

  void run_segment(const Sequence& s, const Task& task, int64_t segment, bool ends) {
    const int64_t start = segment * kSegment, end = start + kSegment < s.length ? start + kSegment : s.length;
    const int64_t chunks = (end - start + c - 1) / c;
    const bool final_state = ends && p.gate != Gate::none && a.grad_final.S;
    restore_state(a.states, p, task, s.slot + segment, S, ld);
    for (int64_t i = p.K * ld; i < Kp * ld; ++i) S[i] = T(0);
    transpose(Kp, ld, S, ld, ST[0], Kp);
    const int64_t states = final_state ? chunks : chunks - 1;
    for (int64_t x = 0; x < states; ++x) {
      const int64_t first = start + x * c, n = end - first < c ? end - first : c;
      chunk.load(p, s, task, first, n, {.q = false, .e = false, .u = false});
      load_rows(a.corrections, s, task, first, n, N);
      advance_transposed(n, ST[x], ST[x + 1]);
    }
    for (int64_t x = chunks - 1; x >= 0; --x) {
      const int64_t first = start + x * c, n = end - first < c ? end - first : c;
      chunk.load(p, s, task, first, n, {.q = true, .e = true, .u = false});
      load_rows(a.corrections, s, task, first, n, N);
      load_rows(a.grad_o, s, task, first, n, G);
      transpose(Kp, ld, dS, ld, dST, Kp);
      if (x < states && p.gate != Gate::none) sums.carry_from_transposed(p, task.width, ST[x + 1], dST);
      run_chunk(s, task, first, n, ST[x], rows_ahead(s, x));
    }
    // For the segment before this one.
    if (start > 0 && p.gate != Gate::none) sums.carry_from(p, S, dS, ld);
  }

  void load_rows(const Rows& r, const Sequence& s, const Task& task, int64_t start, int64_t n, T* out) {
    for (int64_t i = 0; i < n; ++i) {
      load_row(r, s.offset(r, start + i, task.head) + task.column, task.width, T(1), out + i * ld);
      for (int64_t j = padded<T>(task.width); j < ld; ++j) out[i * ld + j] = T(0);
    }
  }

  // S^T <- S^T total + N^T k_out
  void advance_transposed(int64_t n, const T* before, T* after) {
    const Left<T> corrections{N, 1, ld};
    const Right<T> keys{chunk.k_out, Kp};
    if (p.gate == Gate::channel) {
      update<T, By::columns>(ld, Kp, n, chunk.total, 0, corrections, keys, before, after, Kp);
    } else {
      update<T>(ld, Kp, n, chunk.total, 0, corrections, keys, before, after, Kp);
    }
  }

  void run_chunk(const Sequence& s, const Task& task, int64_t start, int64_t n, const T* ST, Ahead ahead) {
    const bool channel = p.gate == Gate::channel, scalar = !channel && p.gate != Gate::none;
    chunk.transpose_keys(p, n);
    chunk.weights(p, n, chunk.e, L);
    chunk.weights(p, n, chunk.q, P);
    read_out<T, Triangle::upper>(n, ld, p.K, {chunk.k_out, Kp, 1}, {dS, ld}, nullptr, chunk.upper(p, P), {G, ld}, D, ld,
                                 ahead);
    solve<T, Triangle::upper>(n, ld, 0, {nullptr, 0, 0}, {nullptr, 0}, chunk.upper(p, L), D, ld);

    for (int64_t i = n * ld; i < padded<T>(n) * ld; ++i) N[i] = T(0);
    transpose(padded<T>(n), ld, N, ld, NT, cp);
    triangle<T>(n, task.width, {G, ld, 1}, {NT, cp}, dP, cp);
    triangle<T>(n, task.width, {D, ld, 1}, {NT, cp}, dL, cp);
    if (channel) {
      for (int64_t i = 0; i < n; ++i) dL[i * cp + i] = T(0);
      scaled_product<T>(n, Kp, task.width, {G, ld, 1}, {ST, Kp}, chunk.prefix, dq, Kp, ahead);
      scaled_product<T>(n, Kp, task.width, {D, ld, 1}, {ST, Kp}, chunk.prefix, de, Kp, ahead);
      scaled_product<T>(n, Kp, task.width, {N, ld, 1}, {dST, Kp}, chunk.suffix, dk, Kp, ahead);
      channel_triangle_backward(n, Kp, chunk.q, chunk.k, chunk.decay, dP, cp, dq, dk);
      channel_triangle_backward(n, Kp, chunk.e, chunk.k, chunk.decay, dL, cp, de, dk);
    } else {
      if (scalar) decay_triangle(n, chunk.decay, dP, cp);
      if (scalar) decay_triangle(n, chunk.decay, dL, cp);
      for (int64_t i = 0; i < n; ++i) dL[i * cp + i] = T(0);
      const T *prefix = scalar ? chunk.prefix : nullptr, *suffix = scalar ? chunk.suffix : nullptr;
      read_out<T>(n, Kp, task.width, {G, ld, 1}, {ST, Kp}, prefix, {dP, cp, 1}, {chunk.k, Kp}, dq, Kp, ahead);
      read_out<T>(n, Kp, task.width, {D, ld, 1}, {ST, Kp}, prefix, {dL, cp, 1}, {chunk.k, Kp}, de, Kp, ahead);
      read_out<T, Triangle::upper>(n, Kp, task.width, {N, ld, 1}, {dST, Kp}, suffix, {dP, 1, cp}, {chunk.q, Kp}, dk, Kp,
                                   ahead);
      add_upper<T>(n, Kp, {dL, 1, cp}, {chunk.e, Kp}, dk, Kp);
    }
    update<T>(p.K, ld, n, chunk.total, channel, {chunk.q_in, 1, Kp}, {G, ld}, dS, dS, ld, ahead);
    update<T>(p.K, ld, n, &one, 0, {chunk.e_in, 1, Kp}, {D, ld}, dS, dS, ld, ahead);

    rows.products(a, s, task, start, n, chunk, dq, de, dk, D);
    if (channel) {
      channel_gate_gradients(a, s, task, start, n, chunk, dq, de, dk, sums);
    } else if (scalar) {
      rows.scalar_gate(a, s, task, start, n, chunk, sums);
    }
    rows.store(a, s, task, start, n, chunk, dq, de, dk, D);
  }

  static constexpr T one = T(1);

  const BackwardArgs& a;
  const Problem& p;
  const int64_t c, Kp, ld, cp;
  Scratch scratch;
  Chunk<T> chunk;
  RowGradients<T> rows;
  T *S, *ST[kMostChunks + 1], *dST, *dS_of_heads, *sums_of_heads, *dS;
  GateSums<T> sums;
  Task next;
  int64_t next_start;
  T *L, *P, *dL, *dP, *N, *NT, *G, *D, *dq, *de, *dk;
};

template <typename T>
static void backward_tasks(const BackwardArgs& a, int64_t begin, int64_t end) {
  // The gradients of states of the heads that are worked on in turn share the second-level cache with what a segment
  // needs besides.
  const int64_t at_once = heads_at_once<T>(a.p, a.p.tile_width, a.p.cache / 4);
  ChunkedBackward<T> chunked(a, a.p.tile_width, at_once);
  for_head_groups(a.p, begin, end, at_once, [&](int64_t task, int64_t heads) { chunked.run(task, heads); });
}

void backward(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  if (a.p.q.element == Element::f64) {
    backward_tasks<double>(a, begin, end);
  } else {
    backward_tasks<float>(a, begin, end);
  }
}

}  // namespace fastweights::delta_rule::FW_LEVEL
