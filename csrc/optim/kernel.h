// What ops.cpp hands to the kernels: tensors that one rule moves, their states as numbers or as codes of the dynamic
// 8-bit maps (codec.h) with an absolute maximum per block of consecutive elements.
#pragma once

#include "core/levels.h"

namespace fastweights::optim {

enum class Rule : int { adam, lion, momentum };

constexpr int kMaxStates = 2;

// A task is up to kTaskElements consecutive elements of one tensor: whole blocks, since a block is a power of two.
constexpr int64_t kMinBlock = 64, kMaxBlock = 4096, kTaskElements = 4096;

constexpr int64_t tasks_of(int64_t size) {
  return (size + kTaskElements - 1) / kTaskElements;
}

struct StepTensor {
  void* param;
  const void* grad;          // of the parameter's element type
  void* states[kMaxStates];  // uint8 where there is absmax, else numbers in the type of the arithmetic
  float* absmax[kMaxStates];
  int64_t size, first_task;
  Element element;
};

// What the rules (rules.h) make of the hyperparameters, in the order in which ops.cpp fills it.
struct Coefficients {
  double rate, decay, beta1, beta2, eps, weight_decay;
};

// Tasks: those of all tensors, in order.
struct StepArgs {
  const StepTensor* tensors;
  int64_t count;
  Rule rule;
  bool quantized;
  int64_t block;
  Coefficients c;
  bool stochastic;  // bfloat16 parameters are rounded at random, by the seed
  uint64_t seed;
};
FW_DECLARE_KERNEL(step, StepArgs)

// Task: kTaskElements of x, [size].
struct CodecArgs {
  Element element;
  void* x;
  uint8_t* codes;
  float* absmax;
  int64_t size, block;
  bool is_signed;
};
FW_DECLARE_KERNEL(quantize_blockwise, CodecArgs)
FW_DECLARE_KERNEL(dequantize_blockwise, CodecArgs)

}  // namespace fastweights::optim
