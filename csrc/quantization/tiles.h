// The weight as the tile registers of AMX read it, rounded to bfloat16.
#pragma once

#include "core/scratch.h"
#include "core/tiles.h"
#include "quantization/backward.h"

namespace fastweights::quantization::FW_LEVEL {

using namespace ::fastweights::FW_LEVEL;

#if defined(__AVX512BF16__) && defined(__x86_64__)

// put(i, w) for every quartet of the inputs [begin, end) of a strip: w[t] are the 16 outputs of input begin + i + t.
template <Format F, typename Put>
FW_INLINE void decode_inputs(const Weight& w, const uint8_t* strip, int64_t begin, int64_t end, const Put& put) {
  for_groups(w, begin, end, [&](int64_t g, int64_t from, int64_t to) {
    const Parameters p = load_parameters<F>(w, strip, g);
    const uint8_t* run = lines_of<F>(w, strip, g) + from / 4 / kRun<F> * kRunBytes<F>;
    for (int64_t k = from; k < to; k += 4 * kRun<F>, run += kRunBytes<F>) {
      FW_UNROLL
      for (int64_t i = 0; i < kRunBytes<F>; i += kLine) prefetch(run + kAhead + i);
      FW_UNROLL
      for (int u = 0; u < kRun<F>; ++u) {
        const Words words = code_words<F>(run, u, 0);
        Vec<float> v[4];
        FW_UNROLL
        for (int t = 0; t < 4; ++t) {
          v[t] = fma(p.scale[0] * level_unit<F>(t), level_at<F>(words, t), p.minimum[0]);
        }
        put(g * w.group + k - begin + 4 * u, v);
      }
    }
  });
}

#endif

}  // namespace fastweights::quantization::FW_LEVEL
