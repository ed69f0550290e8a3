// The forward in chunks. With S the state before a chunk, P = tril(q k^T) with its decays:
// o = prefix (q S) + P v, S <- total S + (suffix k)^T v.
#include "linear_attention/chunk.h"

namespace fastweights::linear_attention::FW_LEVEL {

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
    kT = scratch.take<T>(chunk.Kp * cp);
    P = scratch.take<T>(c * cp);
    o = scratch.take<T>(c * ld);
    part = scratch.take<T>(cp * kLanes<T>);
  }

  // Heads [first, first + heads) of one sequence and tile: chunks outside, heads inside, since the rows of the heads
  // of one token are neighbours in memory.
  void run(int64_t first_task, int64_t heads) {
    Task task = Task::of(p, first_task);
    const Sequence s = Sequence::of(p, task.n);
    for (int64_t h = 0; h < heads; ++h)
      load_state(a.p.initial, Task::of(p, first_task + h), p.K, p.HV, p.normalize, S + h * p.K * ld, ld);
    for (int64_t start = 0; start < s.length; start += c) {
      const int64_t n = s.length - start < c ? s.length - start : c;
      for (int64_t h = 0; h < heads; ++h) {
        task = Task::of(p, first_task + h);
        T* state = S + h * p.K * ld;
        if (a.states && start % kSegment == 0) keep_state(a.states, p, task, s.slot + start / kSegment, state, ld);
        chunk.load(p, s, task, start, n, !a.only_states);
        const bool last = h + 1 == heads;
        const int64_t next = last ? start + c : start;
        Ahead ahead = rows_ahead(s, Task::of(p, first_task + (last ? 0 : h + 1)), next);
        if (!a.only_states) write_outputs(s, task, start, n, state, ahead);
        update<T>(p.K, ld, n, chunk.total, p.gate == Gate::channel, {chunk.k_out, 1, chunk.Kp}, {chunk.v, ld}, state,
                  state, ld, ahead);
      }
    }
    for (int64_t h = 0; h < heads; ++h)
      store_state(a.final, Task::of(p, first_task + h), p.K, p.HV, p.normalize, S + h * p.K * ld, ld);
  }

 private:
  static size_t bytes(const Problem& p, int64_t columns, int64_t heads) {
    const int64_t c = chunk_of(p), ld = padded<T>(columns), cp = padded<T>(c);
    return Chunk<T>::bytes(p, columns) + Scratch::take_bytes<T>(heads * p.K * ld) +
           Scratch::take_bytes<T>(padded<T>(p.K) * cp) + Scratch::take_bytes<T>(c * cp) +
           Scratch::take_bytes<T>(c * ld) + Scratch::take_bytes<T>(cp * kLanes<T>);
  }

  Ahead rows_ahead(const Sequence& s, const Task& task, int64_t start) const {
    Ahead ahead(s, start, c);
    ahead.add(p.q, task.key_head, 0, p.K);
    ahead.add(p.k, task.key_head, 0, p.K);
    ahead.add(p.v, task.head, task.column, task.width);
    ahead.add(p.g, task.head, 0, p.gate == Gate::channel ? p.K : 1);
    ahead.add(a.o, task.head, task.column, task.width);
    return ahead;
  }

  void write_outputs(const Sequence& s, const Task& task, int64_t start, int64_t n, const T* state, Ahead& ahead) {
    const bool channel = p.gate == Gate::channel;
    if (channel) {
      channel_triangle(n, chunk.Kp, chunk.q, chunk.k, chunk.decay, P, cp, part);
    } else {
      transpose(padded<T>(n), chunk.Kp, chunk.k, chunk.Kp, kT, cp);
      triangle<T>(n, p.K, {chunk.q, chunk.Kp, 1}, {kT, cp}, P, cp);
      if (p.gate != Gate::none) decay_triangle(n, chunk.decay, P, cp);
    }
    const Left<T> scores = channel ? Left<T>{P, 1, cp} : Left<T>{P, cp, 1};
    const bool direct = !p.normalize && int64_t(sizeof(T)) == size_of(a.o.element) && task.width == ld;
    T* out = direct ? static_cast<T*>(a.o.data) + s.offset(a.o, start, task.head) + task.column : o;
    const int64_t ld_out = direct ? a.o.time * s.step : ld;
    read_out<T>(n, ld, p.K, {chunk.q_in, chunk.Kp, 1}, {state, ld}, nullptr, scores, {chunk.v, ld}, out, ld_out, ahead);
    if (direct) return;
    for (int64_t i = 0; i < n; ++i) {
      T* row = o + i * ld;
      if (p.normalize) {
        const T inverse = T(1) / (row[task.width] + T(p.eps));
        for (int64_t j = 0; j < task.width; ++j) row[j] *= inverse;
      }
      store_row(a.o, s.offset(a.o, start + i, task.head) + task.column, task.width, row);
    }
  }

  const ForwardArgs& a;
  const Problem& p;
  const int64_t c, ld, cp;
  Scratch scratch;
  Chunk<T> chunk;
  T *S, *kT, *P, *o, *part;
};

template <typename T>
static void forward_tasks(const ForwardArgs& a, int64_t begin, int64_t end) {
  if (a.p.form == Form::recurrent) {
    for (int64_t task = begin; task < end; ++task) recurrent_forward<T>(a, task);
    return;
  }
  const int64_t columns = a.p.tile_width + a.p.normalize;
  // The states of the heads that are worked on in turn stay in the second-level cache.
  const int64_t at_once = heads_at_once<T>(a.p, columns, a.p.cache / 2);
  ChunkedForward<T> chunked(a, columns, at_once);
  for_head_groups(a.p, begin, end, at_once, [&](int64_t task, int64_t heads) { chunked.run(task, heads); });
}

void forward(const ForwardArgs& a, int64_t begin, int64_t end) noexcept {
  if (a.p.q.element == Element::f64) {
    forward_tasks<double>(a, begin, end);
  } else {
    forward_tasks<float>(a, begin, end);
  }
}

}  // namespace fastweights::linear_attention::FW_LEVEL
