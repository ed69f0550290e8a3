// The packed weight as it comes from torch: everything about it is checked here, before a kernel reads a byte.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>

#include "core/check.h"
#include "quantization/kernel.h"

namespace fastweights::quantization {

const char* format_name(Format format);

// The layout of a weight [out_features, in_features]; `packed` is not set.
Weight weight_layout(const char* op, const std::string& format, int64_t out_features, int64_t in_features,
                     int64_t group_size);

// The same over a tensor, whose size must match; `owner` keeps the bytes alive.
struct PackedWeight : Weight {
  Tensor owner;
};
PackedWeight weight_of(const char* op, const Tensor& packed, const std::string& format, int64_t out_features,
                       int64_t in_features, int64_t group_size);

// Whether scales are rounded to float16.
bool stores_float16(const Weight& weight);

// Raises if a scale or a minimum is infinite or NaN: `what` says of which tensor.
void check_finite(const char* op, const char* what, const Weight& weight);

}  // namespace fastweights::quantization
