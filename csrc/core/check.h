// The one wording of argument errors: `op: expected <argument and rule>, got <what came>`. Thrown as
// std::runtime_error, since the stable ABI's own check macro prefixes file and line.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/dtype.h"

namespace fastweights {

using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

template <typename... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

inline std::string shape_text(const int64_t* sizes, size_t n) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < n; ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

inline std::string shape_of(const Tensor& t) {
  const auto s = t.sizes();
  return shape_text(s.data(), s.size());
}

// `letters` are the dimensions as the documentation writes them, such as "[B, T, H, K]".
inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank, const char* letters) {
  check(t.dim() == rank, op, "expected ", name, " of shape ", letters, ", got ", shape_of(t));
}

// `origin` says where the expected sizes come from, such as "q"; empty if nowhere in particular.
inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                        const char* letters, const char* origin) {
  const auto got = t.sizes();
  bool same = got.size() == sizes.size();
  size_t i = 0;
  for (int64_t s : sizes) {
    same = same && got[i] == s;
    ++i;
    if (!same) break;
  }
  if (same) return;
  const std::string from = *origin ? std::string(" (from ") + origin + ")" : std::string();
  fail(op, "expected ", name, " of shape ", letters, " = ", shape_text(sizes.begin(), sizes.size()), from, ", got ",
       shape_of(t));
}

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  check(t.is_cpu(), op, "expected ", name, " on the CPU, got a tensor on device type ", int(t.device().type()));
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  check(t.scalar_type() == other.scalar_type(), op, "expected ", name, " of dtype ", dtype_name(other.scalar_type()),
        " (from ", other_name, "), got ", dtype_name(t.scalar_type()));
}

// float32, bfloat16, float16 or float64.
inline void check_floating(const char* op, const char* name, const Tensor& t) {
  check(is_floating(t.scalar_type()), op, "expected ", name, " of dtype float32, bfloat16, float16 or float64, got ",
        dtype_name(t.scalar_type()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype, const char* why) {
  check(t.scalar_type() == dtype, op, "expected ", name, " of dtype ", dtype_name(dtype), why, ", got ",
        dtype_name(t.scalar_type()));
}

// The tensor itself if its last dimension is contiguous (any other strides are read as they are), else a copy.
inline Tensor with_contiguous_last(const Tensor& t) {
  const bool readable = t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1;
  return readable ? t : torch::stable::contiguous(t);
}

// The same without a call into torch where nothing is to be converted.
inline Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

}  // namespace fastweights
