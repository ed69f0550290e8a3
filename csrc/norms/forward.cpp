#include "core/element.h"
#include "norms/rows.h"

namespace fastweights::norms::FW_LEVEL {

template <Gate kGate, typename S>
static void forward_tasks(const ForwardArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const Problem& p = a.p;
  const T* weight = static_cast<const T*>(p.weight);
  for_rows(
      p, begin, end, [](int64_t) {},
      [&](const int64_t* index) {
        const S* x = row_at<S>(p.x, index);
        const S* gate = kGate == Gate::none ? nullptr : row_at<S>(p.gate, index);
        S* y = row_at<S>(a.y, index);
        Vec<T> squares = zero<T>();
        for_vectors<T>(p.D, [&](int64_t j, auto part) {
          const Vec<T> v = load_as(x + j, part);
          squares = fma(v, v, squares);
        });
        const Vec<T> scale = set1(reciprocal_root(reduce_add<T>(squares) / T(p.D) + T(p.eps)));
        for_vectors<T>(p.D, [&](int64_t j, auto part) {
          Vec<T> v = load_as(x + j, part) * scale;
          if (weight) v *= load_as(weight + j, part);
          if constexpr (kGate != Gate::none) v *= activated<kGate>(load_as(gate + j, part));
          store_as(y + j, v, part);
        });
      });
}

template <typename S>
static void forward_of(const ForwardArgs& a, int64_t begin, int64_t end) {
  a.p.activation == Gate::none   ? forward_tasks<Gate::none, S>(a, begin, end)
  : a.p.activation == Gate::silu ? forward_tasks<Gate::silu, S>(a, begin, end)
                                 : forward_tasks<Gate::sigmoid, S>(a, begin, end);
}

void forward(const ForwardArgs& a, int64_t begin, int64_t end) noexcept {
  with_element(a.p.element, [&]<typename S>(S) { forward_of<S>(a, begin, end); });
}

}  // namespace fastweights::norms::FW_LEVEL
