// The backward of both ops: what the kernels write, and the sums over query heads that share an input.
#pragma once

#include "attention/arguments.h"
#include "core/cpu_level.h"
#include "core/parallel.h"

namespace fastweights::attention {

struct Gradients {
  Arguments& a;
  BackwardArgs args;
  Tensor dq, dqf, dk_parts, dv_parts, dkf_parts;

  Gradients(Arguments& arguments, const Tensor& grad_o) : a(arguments), args{arguments.in} {
    const Inputs& in = a.in;
    const ScalarType dtype = a.held.front().scalar_type();
    // A multiple of every level's lanes, so that the layout does not depend on the level.
    const auto padded = [](int64_t d) { return (d + 15) / 16 * 16; };
    args.dO = a.rows(grad_o);
    args.K_pad = padded(in.K);
    args.V_pad = padded(in.V);
    args.F_pad = padded(in.F);
    args.rows = a.B * a.T + in.sequences * (in.position ? in.ring : 0);
    dq = a.make({a.B, a.T, in.HQ, in.K}, dtype);
    dk_parts = a.make_zeros({in.HQ, args.rows, args.K_pad});
    dv_parts = a.make_zeros({in.HQ, args.rows, args.V_pad});
    args.dq = dq.mutable_data_ptr();
    args.dk = dk_parts.mutable_data_ptr();
    args.dv = dv_parts.mutable_data_ptr();
    if (in.F == 0) return;
    dqf = a.make({a.B, a.T, in.HQ, in.F}, dtype);
    dkf_parts = a.make_zeros({in.HQ, args.rows, args.F_pad});
    args.dqf = dqf.mutable_data_ptr();
    args.dkf = dkf_parts.mutable_data_ptr();
  }

  void run() const {
    parallel_tasks(a.in.sequences * a.in.HQ, 3 * flops_per_query(a.in) * double(a.T),
                   [&](int64_t begin, int64_t end) { FW_KERNEL(backward)(args, begin, end); });
  }

  Tensor dk(Tensor* past = nullptr) const { return reduced(dk_parts, a.in.HKV, a.in.K, past); }
  Tensor dv(Tensor* past = nullptr) const { return reduced(dv_parts, a.in.HKV, a.in.V, past); }
  Tensor dkf(Tensor* past = nullptr) const { return reduced(dkf_parts, a.in.HF, a.in.F, past); }

  // `past` receives the gradient of the ring.
  Tensor reduced(const Tensor& parts, int64_t heads, int64_t D, Tensor* past) const {
    Tensor out = a.make({a.B, a.T, heads, D}, a.held.front().scalar_type());
    if (past) *past = a.make_zeros({a.in.sequences, heads, a.in.ring, D});
    const ReduceArgs sums{a.in,
                          args.rows,
                          heads,
                          D,
                          parts.size(2),
                          parts.const_data_ptr(),
                          out.mutable_data_ptr(),
                          past ? past->mutable_data_ptr() : nullptr};
    parallel_tasks(a.in.sequences * heads, double(a.in.HQ / heads * a.T * D),
                   [&](int64_t begin, int64_t end) { FW_KERNEL(reduce)(sums, begin, end); });
    return out;
  }
};

}  // namespace fastweights::attention
