#include "core/element.h"
#include "core/rows.h"
#include "core/scratch.h"
#include "norms/rows.h"

namespace fastweights::norms::FW_LEVEL {

// With e = dy act(gate) and dn = e weight: dx = r (dn - n mean(dn n)), dweight = sum over rows of e n, and dgate =
// dy n weight act'(gate). One sweep for both sums over the row, which keeps e and the gate's sigmoid, and one to write.
template <Gate kGate, typename S>
static void backward_tasks(const BackwardArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const Problem& p = a.p;
  const int64_t Dp = padded<T>(p.D);
  Scratch scratch(2 * Scratch::take_bytes<T>(Dp));
  T *e = scratch.take<T>(Dp), *opening = scratch.take<T>(Dp);
  const T* weight = static_cast<const T*>(p.weight);
  T* partial = nullptr;
  for_rows(
      p, begin, end,
      [&](int64_t task) {
        if (!a.partial) return;
        partial = static_cast<T*>(a.partial) + task * p.D;
        for (int64_t j = 0; j < p.D; ++j) partial[j] = T(0);
      },
      [&](const int64_t* index) {
        const S *x = row_at<S>(p.x, index), *dy = row_at<S>(a.dy, index);
        const S* gate = kGate == Gate::none ? nullptr : row_at<S>(p.gate, index);
        Vec<T> squares = zero<T>(), product = zero<T>();
        for_vectors<T>(p.D, [&](int64_t j, auto part) {
          const Vec<T> v = load_as(x + j, part);
          Vec<T> d = load_as(dy + j, part);
          if constexpr (kGate != Gate::none) {
            const Vec<T> z = load_as(gate + j, part), s = sigmoid(z);
            store(opening + j, s);
            d *= kGate == Gate::silu ? z * s : s;
          }
          store(e + j, d);
          squares = fma(v, v, squares);
          product = fma(weight ? d * load_as(weight + j, part) : d, v, product);
        });
        const T r = reciprocal_root(reduce_add<T>(squares) / T(p.D) + T(p.eps));
        const Vec<T> scale = set1(r), mean = set1(r * r * reduce_add<T>(product) / T(p.D));
        S* dx = row_at<S>(a.dx, index);
        S* dgate = kGate == Gate::none ? nullptr : row_at<S>(a.dgate, index);
        for_vectors<T>(p.D, [&](int64_t j, auto part) {
          const Vec<T> v = load_as(x + j, part), d = load(e + j), n = v * scale;
          const Vec<T> w = weight ? load_as(weight + j, part) : set1(T(1));
          store_as(dx + j, scale * (d * w - v * mean), part);
          if (partial) store_as(partial + j, fma(d, n, load_as(partial + j, part)), part);
          if constexpr (kGate != Gate::none) {
            const Vec<T> s = load(opening + j), z = load_as(gate + j, part);
            const Vec<T> derivative = kGate == Gate::silu ? silu_derivative(z, s) : s * (set1(T(1)) - s);
            store_as(dgate + j, load_as(dy + j, part) * n * w * derivative, part);
          }
        });
      });
}

template <typename S>
static void backward_of(const BackwardArgs& a, int64_t begin, int64_t end) {
  a.p.activation == Gate::none   ? backward_tasks<Gate::none, S>(a, begin, end)
  : a.p.activation == Gate::silu ? backward_tasks<Gate::silu, S>(a, begin, end)
                                 : backward_tasks<Gate::sigmoid, S>(a, begin, end);
}

void backward(const BackwardArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.p.element, [&]<typename S>(S) { backward_of<S>(a, begin, end); });
}

}  // namespace fastweights::norms::FW_LEVEL
