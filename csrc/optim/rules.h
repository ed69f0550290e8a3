// The rules. Each takes a parameter, its gradient and its states, leaves the new states and returns the new parameter.
// A further one is a struct here, its name in kernel.h and ops.cpp and a class in Python.
#pragma once

#include "core/vec.h"
#include "optim/kernel.h"

namespace fastweights::optim::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

template <typename T>
struct Factors {
  Vec<T> rate, decay, beta1, beta2, rest1, rest2, eps, weight_decay;

  explicit Factors(const Coefficients& c)
      : rate(set1(T(c.rate))),
        decay(set1(T(c.decay))),
        beta1(set1(T(c.beta1))),
        beta2(set1(T(c.beta2))),
        rest1(set1(T(1 - c.beta1))),
        rest2(set1(T(1 - c.beta2))),
        eps(set1(T(c.eps))),
        weight_decay(set1(T(c.weight_decay))) {}
};

// Compilers make one instruction of it.
template <typename T>
FW_INLINE Vec<T> square_root(Vec<T> x) {
  Vec<T> y;
  for (int i = 0; i < kLanes<T>; ++i) y[i] = sizeof(T) == 8 ? T(__builtin_sqrt(x[i])) : T(__builtin_sqrtf(x[i]));
  return y;
}

// Kingma and Ba 2014, with decoupled decay (Loshchilov and Hutter 2017). ops.cpp puts both bias corrections into rate
// and eps.
struct Adam {
  static constexpr int kStates = 2;
  static constexpr bool kSigned[kMaxStates] = {true, false};

  template <typename T>
  FW_INLINE Vec<T> next(Vec<T> p, Vec<T> g, Vec<T>* s, const Factors<T>& f) {
    s[0] = fma(f.beta1, s[0], f.rest1 * g);
    s[1] = fma(f.beta2, s[1], f.rest2 * g * g);
    return f.decay * p - f.rate * (s[0] / (square_root<T>(s[1]) + f.eps));
  }
};

// Chen et al. 2023.
struct Lion {
  static constexpr int kStates = 1;
  static constexpr bool kSigned[kMaxStates] = {true, true};

  template <typename T>
  FW_INLINE Vec<T> next(Vec<T> p, Vec<T> g, Vec<T>* s, const Factors<T>& f) {
    const Vec<T> direction = fma(f.beta1, s[0], f.rest1 * g), still = zero<T>();
    s[0] = fma(f.beta2, s[0], f.rest2 * g);
    return f.decay * p - (direction > still ? f.rate : (direction < still ? -f.rate : still));
  }
};

// SGD with momentum; the decay is a part of the gradient.
struct Momentum {
  static constexpr int kStates = 1;
  static constexpr bool kSigned[kMaxStates] = {true, true};

  template <typename T>
  FW_INLINE Vec<T> next(Vec<T> p, Vec<T> g, Vec<T>* s, const Factors<T>& f) {
    s[0] = fma(f.beta1, s[0], fma(f.weight_decay, p, g));
    return p - f.rate * s[0];
  }
};

}  // namespace fastweights::optim::FW_LEVEL
