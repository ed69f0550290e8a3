// What the forward and the backward op check and lay out alike.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "core/pages.h"
#include "linear_attention/kernel.h"

namespace fastweights::linear_attention {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

Rows rows_of(const Tensor& t);

// A state [N, HV, K, V] (or [N, HV, V, K]) and its z; either may be absent.
States states_of(const OptionalTensor& S, const OptionalTensor& z, bool v_first);

// Raises unless S and z, where given, fit the inputs; `origin` names them in the message.
void check_state(const char* op, const char* name, const OptionalTensor& S, const OptionalTensor& z,
                 const Inputs& inputs, const Options& options);

Tensor new_state(const Inputs& inputs, bool v_first);
Tensor new_z(const Inputs& inputs);
Tensor none_like(const Inputs& inputs);

// Slots of the kept states, and the tensor for them.
int64_t state_slots(const Inputs& inputs);
Tensor new_kept_states(const Inputs& inputs);

// Splits V so that there are about `tasks` tasks, in tiles of at least 32 columns.
void split_columns(Problem& p, int64_t tasks);

void run_forward(const ForwardArgs& args);

}  // namespace fastweights::linear_attention
