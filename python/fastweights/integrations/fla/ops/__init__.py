"""The public functions of `fla.ops`, flat and by family, on our ops; fla itself is not needed.

`from fla.ops.gla import chunk_gla` becomes `from fastweights.integrations.fla.ops.gla import
chunk_gla`: names, positional order, defaults, exceptions and their texts are fla 0.6's. What fla
cannot do and our ops can is allowed: float32 and float64 everywhere, and a backward of every
function.
"""

from fastweights.integrations.fla.ops.delta_rule import (
    chunk_delta_rule,
    fused_chunk_delta_rule,
    fused_recurrent_delta_rule,
)
from fastweights.integrations.fla.ops.gated_delta_product import chunk_gated_delta_product
from fastweights.integrations.fla.ops.gated_delta_rule import (
    chunk_gated_delta_rule,
    chunk_gdn,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
)
from fastweights.integrations.fla.ops.gdn2 import chunk_gdn2, fused_recurrent_gdn2
from fastweights.integrations.fla.ops.gla import chunk_gla, fused_chunk_gla, fused_recurrent_gla
from fastweights.integrations.fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn
from fastweights.integrations.fla.ops.kda import chunk_kda, fused_kda_gate, fused_recurrent_kda
from fastweights.integrations.fla.ops.lightning_attn import (
    chunk_lightning_attn,
    fused_recurrent_lightning_attn,
)
from fastweights.integrations.fla.ops.linear_attn import (
    chunk_linear_attn,
    fused_chunk_linear_attn,
    fused_recurrent_linear_attn,
)
from fastweights.integrations.fla.ops.retention import (
    chunk_retention,
    fused_chunk_retention,
    fused_recurrent_retention,
    parallel_retention,
)
from fastweights.integrations.fla.ops.simple_gla import (
    chunk_simple_gla,
    fused_chunk_simple_gla,
    fused_recurrent_simple_gla,
    parallel_simple_gla,
)

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gdn2",
    "chunk_gla",
    "chunk_hgrn",
    "chunk_kda",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_delta_rule",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_kda_gate",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gdn2",
    "fused_recurrent_gla",
    "fused_recurrent_hgrn",
    "fused_recurrent_kda",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "parallel_retention",
    "parallel_simple_gla",
]
