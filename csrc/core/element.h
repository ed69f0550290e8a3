// From the element type that an op was called with to the type that its kernel is compiled for.
#pragma once

#include "core/levels.h"
#include "core/vec.h"

namespace fastweights::FW_LEVEL {

// f(S{}) with the type of an element.
template <typename F>
FW_INLINE void with_element(Element e, const F& f) {
  switch (e) {
    case Element::f32:
      return f(float{});
    case Element::bf16:
      return f(bfloat16{});
    case Element::f16:
      return f(float16{});
    case Element::f64:
      return f(double{});
  }
}

}  // namespace fastweights::FW_LEVEL
