// B to the rows that the products read, and gradients of these back, with a factor and a change of type on the way.
#include "lora/transpose.h"

namespace fastweights::lora::FW_LEVEL {

void transpose(const TransposeArgs& a, int64_t begin, int64_t end) noexcept {
  const int64_t first = begin * kTransposeRows, last = end * kTransposeRows < a.rows ? end * kTransposeRows : a.rows;
  with_element(a.from, [&]<typename From>(From) {
    with_element(a.to, [&]<typename To>(To) {
      if constexpr (sizeof(Compute<From>) == sizeof(Compute<To>)) transpose_rows<From, To>(a, first, last);
    });
  });
}

}  // namespace fastweights::lora::FW_LEVEL
