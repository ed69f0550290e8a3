// Rows of x as the matmul kernels read them, for the ops of this family and of those that build on it.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "core/cpu_level.h"
#include "quantization/kernel.h"
#include "quantization/ops_weight.h"

namespace fastweights::quantization {

// Memory for M packed rows of x that meet a weight of the layout of `w`.
class PackedActivations {
 public:
  PackedActivations(bool quantized, bool wide, int64_t M, const Weight& w) {
    check(!quantized || takes_int8(w.format), "quantized_linear", "expected activation float for format ",
          format_name(w.format), ", got int8");
    const int64_t Kp = w.groups * w.group, blocks = Kp / block_of(w.group), element = wide ? 8 : 4;
    const int64_t sums = round_up(M * w.groups * element);
    const int64_t values = round_up(M * Kp * (quantized ? 1 : element));
    const int64_t scales = quantized ? round_up(M * blocks * 4) : 0;
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, size_t(sums + values + 2 * scales + 64))));
    if (!memory_) throw std::bad_alloc();
    uint8_t* p = memory_.get();
    view.quantized = quantized;
    view.sums = p;
    p += sums;
    view.codes = reinterpret_cast<int8_t*>(p);
    view.values = p;
    p += values;
    view.scales = reinterpret_cast<float*>(p);
    view.code_sums = reinterpret_cast<int32_t*>(p + scales);
  }

  Activations view{};

 private:
  static int64_t round_up(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
};

// The tasks [begin, end) of the packing: blocks of kSourceRows rows.
inline void pack(const ActivationArgs& args, int64_t begin, int64_t end) {
  FW_KERNEL(pack_activations)(args, begin, end);
}

// The tasks [begin, end) of one product: row blocks times strips.
inline void matmul(const MatmulArgs& args, int64_t begin, int64_t end) {
  args.x.quantized ? FW_KERNEL(matmul_int8)(args, begin, end) : FW_KERNEL(matmul_float)(args, begin, end);
}

}  // namespace fastweights::quantization
