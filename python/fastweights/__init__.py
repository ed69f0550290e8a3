"""Efficient transformers in PyTorch on the CPU."""

from fastweights import _load as _load
from fastweights.conversion import (
    linearize,
    load,
    perplexity,
    recover,
    save,
    transfer_attention,
)
from fastweights.ops.attention.functional import (
    hybrid_attention,
    hybrid_attention_step,
    window_attention,
)
from fastweights.ops.attention.state import HybridState
from fastweights.ops.linear_attention.functional import linear_attention, linear_attention_step

__all__ = [
    "HybridState",
    "hybrid_attention",
    "hybrid_attention_step",
    "linear_attention",
    "linear_attention_step",
    "linearize",
    "load",
    "perplexity",
    "recover",
    "save",
    "transfer_attention",
    "window_attention",
]
