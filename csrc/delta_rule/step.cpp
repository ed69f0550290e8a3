#include "delta_rule/recurrent.h"

namespace fastweights::delta_rule::FW_LEVEL {

template <typename T>
static void step_tasks(const StepArgs& a, int64_t begin, int64_t end) {
  const Problem& p = a.p;
  const int64_t whole = p.V / kLanes<T> * kLanes<T>, ld = p.initial.key, a_step = p.gate == Gate::channel;
  Scratch scratch(Token<T>::bytes(p, p.V));
  Token<T> token(p, p.V, scratch);
  for (int64_t index = begin; index < end; ++index) {
    const Task task = Task::of(p, index);
    const Sequence s = Sequence::of(p, task.n);
    token.load(p, s, task, 0);
    T* S = static_cast<T*>(p.initial.S) + task.n * p.initial.sequence + task.head * p.initial.head;
    advance(p.K, whole, S, ld, token.q, token.k, token.e, token.a, a_step, token.kq, token.d, token.o);
    for (int64_t j = whole; j < p.V; ++j) {
      T d = token.d[j], o = T(0);
      for (int64_t i = 0; i < p.K; ++i) {
        d += token.e[i] * S[i * ld + j];
        o += token.q[i] * S[i * ld + j];
      }
      token.o[j] = o + token.kq * d;
      for (int64_t i = 0; i < p.K; ++i) S[i * ld + j] = S[i * ld + j] * token.a[i * a_step] + token.k[i] * d;
    }
    store_row(a.o, s.offset(a.o, 0, task.head), p.V, token.o);
  }
}

void step(const StepArgs& a, int64_t begin, int64_t end) noexcept {
  if (a.p.q.element == Element::f64) {
    step_tasks<double>(a, begin, end);
  } else {
    step_tasks<float>(a, begin, end);
  }
}

}  // namespace fastweights::delta_rule::FW_LEVEL
