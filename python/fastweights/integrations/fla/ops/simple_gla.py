"""`fla.ops.simple_gla`: linear attention with a decay per head, S_t = e^g_t S_{t-1} + k_t v_t^T."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights.integrations.fla.ops import _arguments
from fastweights.ops.linear_attention.functional import linear_attention

__all__ = [
    "chunk_simple_gla",
    "fused_chunk_simple_gla",
    "fused_recurrent_simple_gla",
    "parallel_simple_gla",
]


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` of fla by `fastweights.linear_attention`.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V]; here its heads may also be a multiple of H.
        g: log-decay [B, T, H].
        g_gamma: log-decay [H] without a gradient; with `g` both apply.
        scale: of q; None means K ** -0.5.
        initial_state: [N, H, K, V], any floating dtype.
        output_final_state: also return the last state, else None.
        state_v_first: states are [N, H, V, K].
        cu_seqlens: [N + 1], B = 1.
        cu_seqlens_cpu: ignored.
        **kwargs: `chunk_size`, a power of two, has no effect; others are ignored, as by fla.

    Returns:
        o [B, T, H, V] in q's dtype and the final state in float32.

    Raises:
        ValueError: packing with B > 1, a wrong number of states, a chunk size of no power of two.
        DeprecationWarning: `head_first`.
    """
    _arguments.refuse_head_first(kwargs)
    chunk_size = kwargs.get("chunk_size")
    if chunk_size is not None and chunk_size != 2 ** (chunk_size.bit_length() - 1):
        raise ValueError(f"`chunk_size` must be a power of 2, got {chunk_size}.")
    return fused_recurrent_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fused_chunk_simple_gla` of fla; see `chunk_simple_gla`."""
    return fused_recurrent_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_simple_gla` of fla; see `chunk_simple_gla`.

    With `reverse` it runs from the last token to the first.
    """
    state_v_first = _arguments.layout(state_v_first, kwargs)
    _arguments.check_packing(q, cu_seqlens, initial_state)
    decay = g
    if g_gamma is not None:
        decay = g_gamma.detach() if g is None else g + g_gamma.detach()
    o, state = linear_attention(
        q,
        k,
        v,
        decay,
        scale=scale,
        initial_state=_arguments.state(initial_state, q),
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
    )
    assert not isinstance(state, tuple)
    return o, state


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`parallel_simple_gla` of fla, in linear time; see `chunk_simple_gla`.

    With `output_attentions` the weights [B, H, T, T] are formed as well, without a gradient.

    Raises:
        ValueError: packing with B > 1.
        AssertionError: `output_attentions` together with packing.
    """
    _arguments.check_packing(q, cu_seqlens, None)
    _arguments.expect(
        not output_attentions or cu_seqlens is None,
        "output_attentions=True is not supported with variable-length sequences",
    )
    o, _ = fused_recurrent_simple_gla(q, k, v, g, scale=scale, cu_seqlens=cu_seqlens)
    return o, _weights(q, k, g, scale) if output_attentions else None


@torch.no_grad()
def _weights(q: Tensor, k: Tensor, g: Tensor | None, scale: float | None) -> Tensor:
    """The weights scale q_i k_j exp(g_{j+1} + ... + g_i), j <= i, [B, H, T, T] in q's dtype."""
    wide = _arguments.state_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    a = torch.einsum("bihk,bjhk->bhij", q.to(wide), k.to(wide)) * scale
    if g is not None:
        total = g.to(wide).transpose(1, 2).cumsum(-1)
        a = a * (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp()
    return a.tril().to(q.dtype)
