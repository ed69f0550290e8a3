"""Decay-family linear attention: none, per-head, per-token and per-channel gates."""

from fastweights.ops.linear_attention.functional import linear_attention, linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]
