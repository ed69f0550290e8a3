"""`fla.ops.gdn2`: GDN-2, Kimi Delta Attention with an erase and a write gate in place of beta."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastweights.integrations.fla.ops import _arguments, kda
from fastweights.ops.delta_rule.functional import delta_rule

__all__ = ["chunk_gdn2", "fused_recurrent_gdn2"]


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cp_context: object = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gdn2` of fla by `fastweights.delta_rule`: S = S^- + k (w v - S^-T (b k))^T.

    Args:
        q: [B, T, H, K], K at most 256.
        k: [B, T, H, K].
        v: [B, T, H, V].
        g: log-decay [B, T, H, K], raw with `use_gate_in_kernel`.
        b: erase gate [B, T, H, K].
        w: write gate [B, T, H, V].
        scale: of q; None means K ** -0.5.
        initial_state: [N, H, K, V] in float32.
        output_final_state: also return the last state, else None.
        use_qk_l2norm_in_kernel: divide q and k by their norms first.
        use_gate_in_kernel: as in `chunk_kda`.
        cu_seqlens: [N + 1], B = 1.
        cu_seqlens_cpu: ignored.
        safe_gate: as in `chunk_kda`.
        lower_bound: as in `chunk_kda`.
        disable_recompute: ignored.
        return_intermediate_states: only False.
        state_v_first: states are [N, H, V, K].
        cp_context: only None.
        **kwargs: `A_log` [H] and `dt_bias` [H * K] of a raw gate. `chunk_size` must be 64. Others
            are ignored, as by fla.

    Returns:
        o [B, T, H, V] in q's dtype and the final state in float32.

    Raises:
        ValueError: packing with B > 1, a wrong number of states, another chunk size, a raw gate
            without `A_log` or a lower bound out of range.
        AssertionError: shapes that do not fit, a state of another dtype.
        NotImplementedError: `cp_context` or `return_intermediate_states`.
    """
    state_v_first = _arguments.layout(state_v_first, kwargs)
    _arguments.refuse_context_parallel(cp_context)
    kda.refuse_intermediate_states(return_intermediate_states)
    _arguments.check_packing(q, cu_seqlens, initial_state)
    _arguments.expect_state_dtype(initial_state, q)
    chunk_size = kwargs.get("chunk_size", 64)
    if chunk_size != 64:
        raise ValueError(f"`chunk_size` must be 64 for GDN-2, got {chunk_size}.")
    kda.check_lower_bound(safe_gate and use_gate_in_kernel, lower_bound)
    _arguments.expect(q.shape == k.shape == g.shape, "q, k, g must have the same shape.")
    K = q.shape[-1]
    _arguments.expect(K <= 256, f"GDN-2 only supports key headdim <= 256, got {K}.")
    return fused_recurrent_gdn2(
        q,
        k,
        v,
        g,
        b,
        w,
        kwargs.get("A_log"),
        kwargs.get("dt_bias"),
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        lower_bound,
        state_v_first,
        cu_seqlens,
    )


def fused_recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_gdn2` of fla, here with gradients; see `chunk_gdn2`.

    v, g, b, w and the state may have HV value heads, a multiple of H.

    Raises:
        ValueError: packing with B > 1, a wrong number of states, a raw gate without `A_log`.
        AssertionError: gates that do not fit.
    """
    state_v_first = _arguments.layout(state_v_first, kwargs)
    _arguments.check_packing(q, cu_seqlens, initial_state)
    erased = (*v.shape[:3], k.shape[-1])
    _arguments.expect(
        b.shape == erased,
        f"b must have shape [B, T, HV, K]; got {tuple(b.shape)} vs expected {erased}.",
    )
    _arguments.expect(
        w.shape == v.shape,
        f"w must have shape [B, T, HV, V] matching v; got {tuple(w.shape)} vs v {tuple(v.shape)}.",
    )
    return delta_rule(
        q,
        k,
        v,
        g=g,
        erase=b,
        write=w,
        scale=scale,
        qk_l2norm=use_qk_l2norm_in_kernel,
        **kda.raw_gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, v.shape[2]),
        initial_state=_arguments.state(initial_state, q),
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )
