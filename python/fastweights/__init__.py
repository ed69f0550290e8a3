"""Efficient transformers in PyTorch on the CPU."""

from fastweights import _load as _load
from fastweights.ops.attention.functional import (
    hybrid_attention,
    hybrid_attention_step,
    window_attention,
)
from fastweights.ops.attention.state import HybridState

__all__ = ["HybridState", "hybrid_attention", "hybrid_attention_step", "window_attention"]
