// What the forward, the backward and the step op check and lay out alike.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/recurrence_ops.h"
#include "delta_rule/kernel.h"

namespace fastweights::delta_rule {

// The tensors as given; those of a step have no dimension of time.
struct Arguments {
  bool step;
  const Tensor &q, &k, &v;
  const OptionalTensor &beta, &g, &erase, &write, &A_log, &dt_bias, &initial_state, &cu_seqlens;
};

struct Options {
  double scale;
  bool qk_l2norm;
  std::optional<double> lower_bound;
  double beta_range;
};

// The checked arguments. The tensors are kept because `problem` points into them: those that could not be read in
// place are copies.
struct Inputs {
  Tensor q, k, v;
  OptionalTensor beta, g, erase, write, A_log, dt_bias, initial_state;
  std::vector<int64_t> starts;
  Problem problem;
  int64_t B;
};

Inputs check_inputs(const char* op, const Arguments& given, const Options& options);

// What only sequences have: a form and an initial state.
void lay_out_sequences(const char* op, Inputs& in, bool state_v_first, const std::string& form);

// The correction of every token, which a forward keeps for the backward.
Tensor new_corrections(const Inputs& in);

void run_forward(const ForwardArgs& args);

}  // namespace fastweights::delta_rule
