// What the forward and the backward op check and lay out alike.
#pragma once

#include <string>
#include <vector>

#include "core/recurrence_ops.h"
#include "linear_attention/kernel.h"

namespace fastweights::linear_attention {

// The checked arguments. The tensors are kept because `problem` points into them: those that could not be read in
// place are copies.
struct Inputs {
  Tensor q, k, v;
  OptionalTensor g, initial_state, initial_z;
  std::vector<int64_t> starts;
  Problem problem;
  int64_t B;
};

struct Options {
  double scale, eps;
  bool normalize, state_v_first, reverse;
  const std::string& form;
};

Inputs check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                    const OptionalTensor& initial_state, const OptionalTensor& initial_z,
                    const OptionalTensor& cu_seqlens, const Options& options);

// Raises unless S and z, where given, fit the inputs; `origin` names them in the message.
void check_state(const char* op, const char* name, const OptionalTensor& S, const OptionalTensor& z,
                 const Inputs& inputs, const Options& options);

Tensor new_z(const Inputs& inputs);

void run_forward(const ForwardArgs& args);

}  // namespace fastweights::linear_attention
