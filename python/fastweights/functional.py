"""Every op, flat: `fastweights.functional.<op>`."""

from fastweights.ops.attention.functional import (
    hybrid_attention,
    hybrid_attention_step,
    window_attention,
)
from fastweights.ops.linear_attention.functional import linear_attention, linear_attention_step

__all__ = [
    "hybrid_attention",
    "hybrid_attention_step",
    "linear_attention",
    "linear_attention_step",
    "window_attention",
]
