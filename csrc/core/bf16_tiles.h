// Whether the tile registers of AMX may be used.
#pragma once

namespace fastweights {

// For products of bfloat16, at the CPU level that runs.
bool has_bf16_tiles() noexcept;

}  // namespace fastweights
