"""Every op, flat: `fastweights.functional.<op>`."""

from fastweights.ops.attention.functional import (
    hybrid_attention,
    hybrid_attention_step,
    window_attention,
)

__all__ = ["hybrid_attention", "hybrid_attention_step", "window_attention"]
