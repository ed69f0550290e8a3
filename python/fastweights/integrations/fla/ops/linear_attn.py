"""`fla.ops.linear_attn`: linear attention without a decay, divided by the sum of its weights."""

from __future__ import annotations

from torch import Tensor

from fastweights.integrations.fla.ops import _arguments
from fastweights.ops.linear_attention.functional import linear_attention

__all__ = ["chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"]

State = Tensor | tuple[Tensor | None, Tensor] | None


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """`chunk_linear_attn` of fla by `fastweights.linear_attention`.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        scale: of q; None means K ** -0.5.
        initial_state: [N, H, K, V]; with `normalize` also the pair (S, z), z [N, 1, H, K].
        output_final_state: also return the last S, else None.
        normalize: divide by scale q_t . z_t + 1e-10, where z_t is the sum of the keys so far. On by
            default here and in `fused_chunk_linear_attn`, off in `fused_recurrent_linear_attn`.
        cu_seqlens: [N + 1], B = 1.

    Returns:
        o [B, T, H, V] in q's dtype and the final state in float32. With `normalize` it is a pair
        (S or None, z) whether it was asked for or not, as in fla, z in k's dtype.

    Raises:
        ValueError: packing with B > 1, a wrong number of states.
    """
    return fused_recurrent_linear_attn(
        q, k, v, scale, initial_state, output_final_state, False, normalize, cu_seqlens
    )


def fused_chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """`fused_chunk_linear_attn` of fla; see `chunk_linear_attn`."""
    return fused_recurrent_linear_attn(
        q, k, v, scale, initial_state, output_final_state, False, normalize, cu_seqlens
    )


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """`fused_recurrent_linear_attn` of fla; see `chunk_linear_attn`.

    With `reverse` it runs from the last token to the first.

    Raises:
        TypeError: a pair without `normalize`.
        ValueError: packing with B > 1, a wrong number of states.
    """
    S, z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    if isinstance(initial_state, tuple) and not normalize:
        raise TypeError("`initial_state` must be a tensor without `normalize`, got a tuple.")
    _arguments.check_packing(q, cu_seqlens, S)
    S = _arguments.state(S, q)
    if z is not None:
        z = z.squeeze(1).to(_arguments.state_dtype(q))
        S = z.new_zeros(*z.shape, v.shape[-1]) if S is None else S
    o, final = linear_attention(
        q,
        k,
        v,
        scale=scale,
        normalize=normalize,
        eps=1e-10,
        initial_state=S if S is None or z is None else (S, z),
        output_final_state=output_final_state or normalize,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
    )
    if not isinstance(final, tuple):
        return o, final
    S, z = final
    return o, (S if output_final_state else None, z.unsqueeze(1).to(k.dtype))
