"""`fla.ops.lightning_attn`: linear attention with decays fixed by head and layer.

They are -(8 / H)(1 - layer_idx / num_layers) h, by which head 0 never decays. That is fla's rule
and not the authors' (`fastweights.nn.LightningAttention` has both).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastweights.integrations.fla.ops import _arguments
from fastweights.integrations.fla.ops.simple_gla import fused_recurrent_simple_gla
from fastweights.ops.linear_attention.decays import lightning_log_decay

__all__ = ["chunk_lightning_attn", "fused_recurrent_lightning_attn"]


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_lightning_attn` of fla: `chunk_simple_gla` with the decays of layer `layer_idx`.

    Raises:
        ValueError: packing with B > 1, a wrong number of states, a layer outside `num_layers`.
        DeprecationWarning: `head_first`.
    """
    _arguments.refuse_head_first(kwargs)
    return fused_recurrent_lightning_attn(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_lightning_attn` of fla; see `chunk_lightning_attn`."""
    return fused_recurrent_simple_gla(
        q,
        k,
        v,
        g_gamma=lightning_log_decay(q.shape[2], layer_idx, num_layers, "linear", q.device),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
    )
