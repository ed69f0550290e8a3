// The fused step: a sweep that reads gradient, parameter and states, writes the parameter and keeps the new states,
// and, for states of 8 bits, a sweep that codes these from the cache.
#include "core/random.h"
#include "core/scratch.h"
#include "optim/codec.h"
#include "optim/rules.h"

namespace fastweights::optim::FW_LEVEL {

// A run of elements of one tensor.
template <typename S>
struct Run {
  S* param;
  const S* grad;
  int64_t size;
  uint64_t key;     // of the random numbers of its task
  int64_t counter;  // of the first of them
};

// To one of the two neighbouring bfloat16, with probabilities that make the mean v. Infinities and NaN stay.
FW_INLINE Vec<float> rounded_at_random(Vec<float> v, Vec<uint32_t> random) {
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(v);
  const Vec<float> rounded = bit_cast<Vec<float>>((bits + (random >> 16)) & 0xffff0000u);
  return (bits & 0x7fffffffu) < 0x7f800000u ? rounded : v;
}

template <typename S, bool kStochastic>
FW_INLINE void store_param(const Run<S>& run, int64_t j, Vec<Compute<S>> v, auto part) {
  if constexpr (kStochastic) {
    store_as(run.param + j, rounded_at_random(v, random_bits(run.key, run.counter + j)), part);
  } else {
    store_as(run.param + j, v, part);
  }
}

template <typename T>
FW_INLINE VecInt<T> is_finite(Vec<T> x) {
  return x - x == 0;
}

// The rule, with parameter and states kept where the new state would not be finite: where the gradient is NaN or
// infinite, or too large for the state. Returns where that is not so.
template <typename R, typename T>
FW_INLINE VecInt<T> advance(Vec<T>& p, Vec<T> g, Vec<T>* states, const Factors<T>& f) {
  Vec<T> next[R::kStates];
  for (int i = 0; i < R::kStates; ++i) next[i] = states[i];
  const Vec<T> moved = R::template next<T>(p, g, next, f);
  const VecInt<T> finite = is_finite<T>(next[R::kStates - 1]);
  for (int i = 0; i < R::kStates; ++i) states[i] = finite ? next[i] : states[i];
  p = finite ? moved : p;
  return finite;
}

template <typename R, typename S, bool kStochastic>
FW_INLINE void step_numbers(const Run<S>& run, Compute<S>* const* states, const Factors<Compute<S>>& f) {
  using T = Compute<S>;
  for_vectors<T>(run.size, [&](int64_t j, auto part) {
    Vec<T> p = load_as(run.param + j, part), s[R::kStates];
    for (int i = 0; i < R::kStates; ++i) s[i] = load_as(states[i] + j, part);
    advance<R, T>(p, load_as(run.grad + j, part), s, f);
    for (int i = 0; i < R::kStates; ++i) store_as(states[i] + j, s[i], part);
    store_param<S, kStochastic>(run, j, p, part);
  });
}

template <bool kSigned>
FW_INLINE void encode(const float* x, int64_t size, float absmax, uint8_t* codes) {
  const Floats inverse = set1(inverse_of(absmax));
  for_vectors<float>(size, [&](int64_t j, auto part) {
    store_bytes(codes + j, code_of<kSigned>(kStateMap<kSigned>, load(x + j) * inverse), part);
  });
}

// The lanes of a vector that are there.
FW_INLINE Ints lanes_of(Whole) {
  return ~Ints{};
}
FW_INLINE Ints lanes_of(int64_t n) {
  Ints lane;
  for (int i = 0; i < kFloats; ++i) lane[i] = i;
  return lane < int32_t(n);
}

// f(0), f(1), ... for the states of a rule, each a constant.
template <int I>
struct Constant {
  constexpr operator int() const { return I; }
};
template <typename R, typename F>
FW_INLINE void for_states(const F& f) {
  f(Constant<0>{});
  if constexpr (R::kStates > 1) f(Constant<1>{});
}

// One block. `numbers` has room for the new states.
template <typename R, typename S, bool kStochastic>
FW_INLINE void step_codes(const Run<S>& run, uint8_t* const* codes, float* const* absmax, const Factors<float>& f,
                          float* const* numbers) {
  Ints most[R::kStates] = {}, moved = {};
  for_vectors<float>(run.size, [&](int64_t j, auto part) {
    Floats p = load_as(run.param + j, part), s[R::kStates];
    for_states<R>([&](auto i) {
      constexpr bool kSigned = R::kSigned[i];
      const Ints code = load_bytes(codes[i] + j, part, kStateMap<kSigned>.zero);
      s[i] = level_of<kSigned>(kStateMap<kSigned>, code) * set1(*absmax[i]);
    });
    moved |= advance<R, float>(p, load_as(run.grad + j, part), s, f) & lanes_of(part);
    store_param<S, kStochastic>(run, j, p, part);
    for_states<R>([&](auto i) {
      store(numbers[i] + j, s[i]);
      most[i] = max(most[i], magnitude_bits(s[i]));
    });
  });
  // Coding is not idempotent where the extreme is negative, since -1 is no level: a block that stays, stays as it is.
  if (reduce_max<int32_t>(-moved) == 0) return;
  for_states<R>([&](auto i) {
    *absmax[i] = bit_cast<float>(reduce_max<int32_t>(most[i]));
    encode<R::kSigned[i]>(numbers[i], run.size, *absmax[i], codes[i]);
  });
}

template <typename R, typename S, bool kStochastic>
static void step_task(const StepArgs& a, const StepTensor& t, int64_t task, float* const* numbers) {
  using T = Compute<S>;
  const Factors<T> f(a.c);
  const int64_t begin = (task - t.first_task) * kTaskElements;
  const int64_t end = begin + kTaskElements < t.size ? begin + kTaskElements : t.size;
  const int64_t length = a.quantized ? a.block : kTaskElements;
  const uint64_t key = kStochastic ? mixed(a.seed + uint64_t(task)) : 0;
  for (int64_t first = begin; first < end; first += length) {
    const Run<S> run{static_cast<S*>(t.param) + first, static_cast<const S*>(t.grad) + first,
                     end - first < length ? end - first : length, key, first - begin};
    if constexpr (sizeof(T) == sizeof(float)) {
      if (a.quantized) {
        uint8_t* codes[R::kStates];
        float* absmax[R::kStates];
        for (int i = 0; i < R::kStates; ++i) {
          codes[i] = static_cast<uint8_t*>(t.states[i]) + first;
          absmax[i] = t.absmax[i] + first / a.block;
        }
        step_codes<R, S, kStochastic>(run, codes, absmax, f, numbers);
        continue;
      }
    }
    T* states[R::kStates];
    for (int i = 0; i < R::kStates; ++i) states[i] = static_cast<T*>(t.states[i]) + first;
    step_numbers<R, S, kStochastic>(run, states, f);
  }
}

template <typename R>
static void step_of(const StepArgs& a, const StepTensor& t, int64_t task, float* const* numbers) {
  switch (t.element) {
    case Element::f64:
      return step_task<R, double, false>(a, t, task, numbers);
    case Element::bf16:
      return a.stochastic ? step_task<R, bfloat16, true>(a, t, task, numbers)
                          : step_task<R, bfloat16, false>(a, t, task, numbers);
    case Element::f16:
      return step_task<R, float16, false>(a, t, task, numbers);
    default:
      return step_task<R, float, false>(a, t, task, numbers);
  }
}

// The tensor of a task: the last that begins at or before it. Empty tensors have no task.
static const StepTensor* tensor_of(const StepArgs& a, int64_t task) {
  int64_t low = 0, high = a.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.tensors[middle].first_task <= task ? low : high) = middle;
  }
  return a.tensors + low;
}

void step(const StepArgs& a, int64_t begin, int64_t end) noexcept {
  if (begin >= end) return;
  Scratch scratch(kMaxStates * Scratch::take_bytes<float>(kMaxBlock));
  float* const numbers[kMaxStates] = {scratch.take<float>(kMaxBlock), scratch.take<float>(kMaxBlock)};
  for (int64_t task = begin; task < end; ++task) {
    const StepTensor& t = *tensor_of(a, task);
    switch (a.rule) {
      case Rule::adam:
        step_of<Adam>(a, t, task, numbers);
        break;
      case Rule::lion:
        step_of<Lion>(a, t, task, numbers);
        break;
      case Rule::momentum:
        step_of<Momentum>(a, t, task, numbers);
        break;
    }
  }
}

}  // namespace fastweights::optim::FW_LEVEL
