"""The plain-torch definition of every op, flat: `fastweights.reference.<op>`."""

from fastweights.ops.attention.reference import (
    hybrid_attention,
    hybrid_attention_step,
    window_attention,
)

__all__ = ["hybrid_attention", "hybrid_attention_step", "window_attention"]
