"""`fla.ops.delta_rule`: DeltaNet, S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from fastweights.integrations.fla.ops import _arguments
from fastweights.integrations.fla.ops._columns import by_value_channel
from fastweights.ops.delta_rule.functional import delta_rule

__all__ = ["chunk_delta_rule", "fused_chunk_delta_rule", "fused_recurrent_delta_rule"]


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_delta_rule` of fla by `fastweights.delta_rule`; also in float32, which fla refuses.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        beta: [B, T, H].
        scale: of q; None means K ** -0.5.
        initial_state: [N, H, K, V], any floating dtype.
        output_final_state: also return the last state, else None.
        use_qk_l2norm_in_kernel: divide q and k by their norms first.
        cu_seqlens: [N + 1], B = 1.
        cu_seqlens_cpu: ignored.
        **kwargs: `chunk_size`, 16, 32 or 64, has no effect; others are ignored, as by fla.

    Returns:
        o [B, T, H, V] in q's dtype and the final state in float32.

    Raises:
        AssertionError: q, k and v of different dtypes, a beta that is not [B, T, H].
        ValueError: packing with B > 1, a wrong number of states, another chunk size.
        DeprecationWarning: `head_first`.
    """
    _arguments.expect(q.dtype == k.dtype == v.dtype, "q, k and v must have the same dtype.")
    _arguments.expect(beta.dim() == 3, "beta must be of shape (batch size, num of head, seq len).")
    _arguments.refuse_head_first(kwargs)
    chunk_size = kwargs.get("chunk_size", 64)
    if chunk_size not in (16, 32, 64):
        raise ValueError(f"`chunk_size` must be 16, 32, or 64, got {chunk_size}.")
    _arguments.check_packing(q, cu_seqlens, initial_state)
    return delta_rule(
        q,
        k,
        v,
        beta=beta,
        scale=scale,
        qk_l2norm=use_qk_l2norm_in_kernel,
        initial_state=_arguments.state(initial_state, q),
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def fused_chunk_delta_rule(**kwargs: Any) -> NoReturn:
    """Removed by fla.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "fused_chunk_delta_rule is deprecated. Please use chunk_delta_rule instead."
    )


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_delta_rule` of fla; see `chunk_delta_rule`.

    `beta` None is 1; [B, T, H, V] is one per value channel, at the cost of a head for each of them.

    Raises:
        AssertionError: a scale that is not positive.
        ValueError: packing with B > 1, a wrong number of states.
    """
    _arguments.check_packing(q, cu_seqlens, initial_state)
    _arguments.expect(scale is None or scale > 0, "scale must be positive")
    options: dict[str, Any] = {
        "beta": beta,
        "scale": scale,
        "qk_l2norm": use_qk_l2norm_in_kernel,
        "initial_state": _arguments.state(initial_state, q),
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    if beta is not None and beta.dim() == 4:
        return by_value_channel(delta_rule, q, k, v, **options)
    return delta_rule(q, k, v, **options)
