// The forward in chunks. With S the state before a chunk, L = strict tril(e k^T) and P = tril(q k^T) with their decays:
//   N = u + (prefix e) S + L N,   o = (prefix q) S + P N,   S <- total S + (suffix k)^T N.
#include "delta_rule/chunk.h"

namespace fastweights::delta_rule::FW_LEVEL {

template <typename T>
static void keep_correction(const ForwardArgs& a, const Sequence& s, const Task& task, int64_t i, const T* d) {
  if (a.corrections.data) store_row(a.corrections, s.offset(a.corrections, i, task.head) + task.column, task.width, d);
}

template <typename T>
static void recurrent_forward(const ForwardArgs& a, int64_t index) {
  const Problem& p = a.p;
  const Task task = Task::of(p, index);
  const Sequence s = Sequence::of(p, task.n);
  const int64_t ld = padded<T>(task.width), a_step = p.gate == Gate::channel;
  Scratch scratch(Scratch::take_bytes<T>(p.K * ld) + Token<T>::bytes(p, task.width));
  T* S = scratch.take<T>(p.K * ld);
  Token<T> token(p, task.width, scratch);
  load_state(p.initial, task, p.K, p.HV, false, S, ld);
  for (int64_t i = 0; i < s.length; ++i) {
    if (a.states && i % kSegment == 0) keep_state(a.states, p, task, s.slot + i / kSegment, S, ld);
    token.load(p, s, task, i);
    advance(p.K, ld, S, ld, token.q, token.k, token.e, token.a, a_step, token.kq, token.d, token.o);
    if (!a.only_states) store_row(a.o, s.offset(a.o, i, task.head) + task.column, task.width, token.o);
    keep_correction(a, s, task, i, token.d);
  }
  store_state(a.final, task, p.K, p.HV, false, S, ld);
}

template <typename T>
class ChunkedForward {
 public:
  ChunkedForward(const ForwardArgs& args, int64_t columns, int64_t heads)
      : a(args),
        p(args.p),
        c(chunk_of(p)),
        ld(padded<T>(columns)),
        cp(padded<T>(c)),
        scratch(bytes(args.p, columns, heads)),
        chunk(p, columns, scratch) {
    S = scratch.take<T>(heads * p.K * ld);
    L = scratch.take<T>(cp * cp), P = scratch.take<T>(cp * cp);
    o = scratch.take<T>(c * ld);
  }

  // Heads [first, first + heads) of one sequence and tile: chunks outside, heads inside, since the rows of the heads
  // of one token are neighbours in memory.
  void run(int64_t first_task, int64_t heads) {
    const Sequence s = Sequence::of(p, Task::of(p, first_task).n);
    for (int64_t h = 0; h < heads; ++h)
      load_state(p.initial, Task::of(p, first_task + h), p.K, p.HV, false, S + h * p.K * ld, ld);
    for (int64_t start = 0; start < s.length; start += c) {
      const int64_t n = s.length - start < c ? s.length - start : c;
      for (int64_t h = 0; h < heads; ++h) {
        const Task task = Task::of(p, first_task + h);
        T* state = S + h * p.K * ld;
        if (a.states && start % kSegment == 0) keep_state(a.states, p, task, s.slot + start / kSegment, state, ld);
        chunk.load(p, s, task, start, n, {.q = !a.only_states, .e = true, .u = true});
        const bool last = h + 1 == heads;
        Ahead ahead = rows_ahead(s, Task::of(p, first_task + (last ? 0 : h + 1)), last ? start + c : start);
        chunk.transpose_keys(p, n);
        chunk.weights(p, n, chunk.e, L);
        chunk.correct(p, n, L, state, ahead);
        for (int64_t i = 0; i < n; ++i) keep_correction(a, s, task, start + i, chunk.u + i * ld);
        if (!a.only_states) write_outputs(s, task, start, n, state, ahead);
        advance_state(p, chunk, n, chunk.u, state, state, ahead);
      }
    }
    for (int64_t h = 0; h < heads; ++h)
      store_state(a.final, Task::of(p, first_task + h), p.K, p.HV, false, S + h * p.K * ld, ld);
  }

 private:
  static size_t bytes(const Problem& p, int64_t columns, int64_t heads) {
    const int64_t c = chunk_of(p), ld = padded<T>(columns), cp = padded<T>(c);
    return Chunk<T>::bytes(p, columns) + Scratch::take_bytes<T>(heads * p.K * ld) +
           2 * Scratch::take_bytes<T>(cp * cp) + Scratch::take_bytes<T>(c * ld);
  }

  Ahead rows_ahead(const Sequence& s, const Task& task, int64_t start) const {
    Ahead ahead(s, start, c);
    ahead.add(p.q, task.key_head, 0, p.K);
    ahead.add(p.k, task.key_head, 0, p.K);
    ahead.add(p.v, task.head, task.column, task.width);
    ahead.add(p.g, task.head, 0, p.gate == Gate::channel ? p.K : 1);
    ahead.add(p.beta, task.head, 0, 1);
    ahead.add(p.erase, task.head, 0, p.K);
    ahead.add(p.write, task.head, task.column, task.width);
    ahead.add(a.o, task.head, task.column, task.width);
    ahead.add(a.corrections, task.head, task.column, task.width);
    return ahead;
  }

  void write_outputs(const Sequence& s, const Task& task, int64_t start, int64_t n, const T* state, Ahead& ahead) {
    chunk.weights(p, n, chunk.q, P);
    const bool direct = int64_t(sizeof(T)) == size_of(a.o.element) && task.width == ld;
    T* out = direct ? static_cast<T*>(a.o.data) + s.offset(a.o, start, task.head) + task.column : o;
    read_out<T>(n, ld, p.K, {chunk.q_in, chunk.Kp, 1}, {state, ld}, nullptr, chunk.lower(p, P), {chunk.u, ld}, out,
                direct ? a.o.time : ld, ahead);
    if (direct) return;
    for (int64_t i = 0; i < n; ++i)
      store_row(a.o, s.offset(a.o, start + i, task.head) + task.column, task.width, o + i * ld);
  }

  const ForwardArgs& a;
  const Problem& p;
  const int64_t c, ld, cp;
  Scratch scratch;
  Chunk<T> chunk;
  T *S, *L, *P, *o;
};

template <typename T>
static void forward_tasks(const ForwardArgs& a, int64_t begin, int64_t end) {
  if (a.p.form == Form::recurrent) {
    for (int64_t task = begin; task < end; ++task) recurrent_forward<T>(a, task);
    return;
  }
  // The states of the heads that are worked on in turn stay in the second-level cache.
  const int64_t at_once = heads_at_once<T>(a.p, a.p.tile_width, a.p.cache / 2);
  ChunkedForward<T> chunked(a, a.p.tile_width, at_once);
  for_head_groups(a.p, begin, end, at_once, [&](int64_t task, int64_t heads) { chunked.run(task, heads); });
}

void forward(const ForwardArgs& a, int64_t begin, int64_t end) noexcept {
  if (a.p.q.element == Element::f64) {
    forward_tasks<double>(a, begin, end);
  } else {
    forward_tasks<float>(a, begin, end);
  }
}

}  // namespace fastweights::delta_rule::FW_LEVEL
