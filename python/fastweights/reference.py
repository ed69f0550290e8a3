"""The plain-torch definition of every op, flat: `fastweights.reference.<op>`."""

from fastweights.ops.attention.reference import (
    hybrid_attention,
    hybrid_attention_step,
    window_attention,
)
from fastweights.ops.linear_attention.reference import linear_attention, linear_attention_step

__all__ = [
    "hybrid_attention",
    "hybrid_attention_step",
    "linear_attention",
    "linear_attention_step",
    "window_attention",
]
