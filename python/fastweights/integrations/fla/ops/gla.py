"""`fla.ops.gla`: linear attention with a decay per channel.

S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t v_t^T.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from fastweights.integrations.fla.ops import _arguments
from fastweights.integrations.fla.ops._columns import by_value_channel
from fastweights.ops.linear_attention.functional import linear_attention

__all__ = ["chunk_gla", "fused_chunk_gla", "fused_recurrent_gla"]


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` of fla by `fastweights.linear_attention`.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        g: log-decay of the key channels [B, T, H, K]: `gk` of `fused_recurrent_gla`.
        scale: of q; None means K ** -0.5.
        initial_state: [N, H, K, V] in float32.
        output_final_state: also return the last state, else None.
        state_v_first: states are [N, H, V, K].
        cu_seqlens: [N + 1], B = 1.
        cu_seqlens_cpu: ignored.

    Returns:
        o [B, T, H, V] in q's dtype and the final state in float32.

    Raises:
        ValueError: packing with B > 1, a wrong number of states.
        AssertionError: shapes that do not fit, a state of another dtype.
    """
    _arguments.check_packing(q, cu_seqlens, initial_state)
    _arguments.expect_state_dtype(initial_state, q)
    _arguments.expect(q.shape == k.shape == g.shape, "q, k, g must have the same shape.")
    _arguments.expect(
        v.dim() == 4 and v.shape[:3] == q.shape[:3],
        "v must be of shape (batch size, seq len, num of head, head dim).",
    )
    return fused_recurrent_gla(
        q, k, v, g, None, scale, initial_state, output_final_state,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_chunk_gla(**kwargs: Any) -> NoReturn:
    """Removed by fla.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("`fused_chunk_gla` is deprecated. Please use `chunk_gla` instead.")


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_gla` of fla; see `chunk_gla`.

    `gv` [B, T, H, V] decays the value channels, at the cost of a head for each of them. With
    `reverse` it runs from the last token to the first.
    """
    state_v_first = _arguments.layout(state_v_first, kwargs)
    _arguments.check_packing(q, cu_seqlens, initial_state)
    options: dict[str, Any] = {
        "g": gk,
        "scale": scale,
        "initial_state": _arguments.state(initial_state, q),
        "output_final_state": output_final_state,
        "reverse": reverse,
        "state_v_first": state_v_first,
        "cu_seqlens": cu_seqlens,
    }
    if gv is not None:
        return by_value_channel(linear_attention, q, k, v, gv=gv, **options)
    o, state = linear_attention(q, k, v, **options)
    assert not isinstance(state, tuple)
    return o, state
