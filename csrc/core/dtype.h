// dtypes as the ops see them.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "core/levels.h"

namespace fastweights {

using torch::headeronly::ScalarType;

inline bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double;
}

inline Element element_of(ScalarType t) {
  switch (t) {
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::Double:
      return Element::f64;
    default:
      return Element::f32;
  }
}

// What is accumulated, and kept as recurrent state, for inputs of this dtype.
inline ScalarType state_dtype(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

}  // namespace fastweights
