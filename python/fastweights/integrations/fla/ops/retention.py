"""`fla.ops.retention`: linear attention with RetNet's decays, 1 - 2^(-5-h) for head h."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastweights.integrations.fla.ops import _arguments
from fastweights.integrations.fla.ops.simple_gla import (
    fused_recurrent_simple_gla,
    parallel_simple_gla,
)
from fastweights.ops.linear_attention.decays import retention_log_decay

__all__ = [
    "chunk_retention",
    "fused_chunk_retention",
    "fused_recurrent_retention",
    "parallel_retention",
]


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_retention` of fla: `chunk_simple_gla` with RetNet's decays.

    Raises:
        ValueError: packing with B > 1, a wrong number of states.
        DeprecationWarning: `head_first`.
    """
    _arguments.refuse_head_first(kwargs)
    return fused_recurrent_retention(
        q, k, v, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fused_chunk_retention` of fla; see `chunk_retention`."""
    return fused_recurrent_retention(
        q, k, v, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_retention` of fla; see `chunk_retention`."""
    return fused_recurrent_simple_gla(
        q,
        k,
        v,
        g_gamma=retention_log_decay(q.shape[2], q.device),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=_arguments.layout(state_v_first, kwargs),
        cu_seqlens=cu_seqlens,
    )


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`parallel_retention` of fla; see `parallel_simple_gla`."""
    g = retention_log_decay(q.shape[2], q.device).expand(q.shape[:3])
    return parallel_simple_gla(q, k, v, g, scale, output_attentions, cu_seqlens)
