// The gates of a token.
#pragma once

#include "core/sequence.h"
#include "core/vmath.h"
#include "linear_attention/kernel.h"

namespace fastweights::linear_attention::FW_LEVEL {
using namespace ::fastweights::FW_LEVEL;

// exp of the gates of token i: [padded(K)] with a gate per channel, one number otherwise.
template <typename T>
FW_INLINE void load_decay(const Problem& p, const Sequence& s, int64_t i, int64_t head, T* out) {
  if (p.gate == Gate::channel) {
    constexpr int L = kLanes<T>;
    load_row(p.g, s.offset(p.g, i, head), p.K, T(1), out);
    for (int64_t j = 0; j < p.K; j += L) store(out + j, exp(load(out + j)));
  } else {
    out[0] = p.gate == Gate::none ? T(1) : exp(static_cast<const T*>(p.g.data)[s.offset(p.g, i, head)]);
  }
}

}  // namespace fastweights::linear_attention::FW_LEVEL
