"""`fla.ops.kda`: Kimi Delta Attention, the gated delta rule with a decay per key channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights.integrations.fla.ops import _arguments
from fastweights.integrations.fla.ops._columns import by_value_channel
from fastweights.ops.delta_rule.functional import delta_rule

__all__ = ["chunk_kda", "fused_kda_gate", "fused_recurrent_kda"]


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_kda` of fla by `fastweights.delta_rule`.

    Args:
        q: [B, T, H, K], K at most 256.
        k: [B, T, H, K].
        v: [B, T, HV, V], HV a multiple of H; value head j reads head j // (HV / H).
        g: log-decay [B, T, HV, K], raw with `use_gate_in_kernel`.
        beta: [B, T, HV], raw with `use_beta_sigmoid_in_kernel`.
        scale: of q; None means K ** -0.5.
        initial_state: [N, HV, K, V] in float32.
        output_final_state: also return the last state, else None.
        use_qk_l2norm_in_kernel: divide q and k by their norms first.
        use_gate_in_kernel: the decay is -exp(A_log) softplus(g + dt_bias), with `lower_bound`
            lower_bound sigmoid(exp(A_log) (g + dt_bias)); A_log None is 0 there.
        use_beta_sigmoid_in_kernel: take the sigmoid of `beta`.
        allow_neg_eigval: twice that sigmoid.
        safe_gate: requires a lower bound in [-5, 0) of a raw gate; it changes nothing else here.
        lower_bound: of the decay; only with `use_gate_in_kernel`.
        disable_recompute: ignored.
        return_intermediate_states: only False.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1], B = 1.
        cu_seqlens_cpu: ignored.
        cp_context: only None.
        use_graph: ignored.
        max_num_seqs: ignored.
        **kwargs: `A_log` [HV] and `dt_bias` [HV * K] of a raw gate. `chunk_size`, 32 or 64, has no
            effect. Others are ignored, as by fla.

    Returns:
        o [B, T, HV, V] in q's dtype and the final state in float32.

    Raises:
        ValueError: packing with B > 1, a wrong number of states, another chunk size, a raw gate
            without `A_log` or a lower bound out of range, `allow_neg_eigval` alone.
        AssertionError: shapes that do not fit, a state of another dtype.
        NotImplementedError: `cp_context` or `return_intermediate_states`.
    """
    state_v_first = _arguments.layout(state_v_first, kwargs)
    _arguments.refuse_context_parallel(cp_context)
    refuse_intermediate_states(return_intermediate_states)
    _arguments.check_packing(q, cu_seqlens, initial_state)
    _arguments.expect_state_dtype(initial_state, q)
    chunk_size = kwargs.get("chunk_size", 64)
    if chunk_size not in (32, 64):
        raise ValueError(f"`chunk_size` must be either 32 or 64 for KDA, got {chunk_size}.")
    check_lower_bound(safe_gate and use_gate_in_kernel, lower_bound)
    B, T, H, K = q.shape
    HV = v.shape[2]
    _arguments.expect(
        q.shape == k.shape, f"q and k must have the same shape, got q={q.shape} vs k={k.shape}"
    )
    _arguments.expect(K <= 256, f"Currently we only support key headdim <=256 for KDA, got {K}.")
    _arguments.expect(
        HV % H == 0,
        f"For GVA, num_v_heads (HV={HV}) must be evenly divisible by num_qk_heads (H={H}), "
        f"but got HV % H = {HV % H}",
    )
    _arguments.expect(
        g.shape == (B, T, HV, K),
        f"g must have shape [B, T, HV, K]={[B, T, HV, K]}, got {list(g.shape)}",
    )
    _arguments.expect(
        beta.shape == (B, T, HV),
        f"beta must have shape [B, T, HV]={[B, T, HV]}, got {list(beta.shape)}",
    )
    return fused_recurrent_kda(
        q,
        k,
        v,
        g,
        beta,
        kwargs.get("A_log"),
        kwargs.get("dt_bias"),
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        lower_bound,
        state_v_first,
        cu_seqlens,
    )


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_kda` of fla, here with gradients; see `chunk_kda`.

    `beta` may also be [B, T, HV, V], one per value channel, at the cost of a head for each of them.

    Raises:
        ValueError: packing with B > 1, a wrong number of states, a raw gate without `A_log`,
            `allow_neg_eigval` alone.
    """
    state_v_first = _arguments.layout(state_v_first, kwargs)
    _arguments.check_packing(q, cu_seqlens, initial_state)
    _arguments.refuse_negative_eigenvalues_without_sigmoid(
        allow_neg_eigval, use_beta_sigmoid_in_kernel
    )
    options: dict[str, Any] = {
        "beta": beta,
        "scale": scale,
        "qk_l2norm": use_qk_l2norm_in_kernel,
        "beta_sigmoid": use_beta_sigmoid_in_kernel,
        "allow_neg_eigval": allow_neg_eigval,
        "initial_state": _arguments.state(initial_state, q),
        "output_final_state": output_final_state,
        "state_v_first": state_v_first,
        "cu_seqlens": cu_seqlens,
    }
    raw = raw_gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, v.shape[2])
    if beta.dim() == 4:
        decay = fused_kda_gate(g, **raw) if use_gate_in_kernel else g
        return by_value_channel(delta_rule, q, k, v, g=decay, **options)
    return delta_rule(q, k, v, g=g, **raw, **options)


def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`fused_kda_gate` of fla: the log-decay [..., HV, K] of a raw gate, in `output_dtype`.

    -exp(A_log) softplus(g + dt_bias), or with `lower_bound` lower_bound sigmoid(exp(A_log)
    (g + dt_bias)), where A_log None is 0; `A_log` [HV], `dt_bias` [HV * K].

    Raises:
        ValueError: neither `A_log` nor `lower_bound`.
    """
    raw = raw_gate(True, A_log, dt_bias, lower_bound, g.shape[-2])
    wide = g.to(_arguments.state_dtype(g))
    if raw["dt_bias"] is not None:
        wide = wide + raw["dt_bias"]
    rate = 1.0 if raw["A_log"] is None else raw["A_log"].to(wide.dtype).exp().unsqueeze(-1)
    if lower_bound is None:
        return (-rate * torch.nn.functional.softplus(wide)).to(output_dtype)
    return (lower_bound * torch.sigmoid(rate * wide)).to(output_dtype)


def raw_gate(
    used: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    value_heads: int,
) -> dict[str, Any]:
    """The arguments of a raw gate in `delta_rule`'s shapes; none of them counts if it is not used.

    Raises:
        ValueError: neither `A_log` nor `lower_bound`.
    """
    if not used:
        return {}
    if A_log is None and lower_bound is None:
        raise ValueError(
            "`A_log` must be provided when `use_gate_in_kernel=True` and `lower_bound` is not set."
        )
    return {
        "A_log": None if A_log is None else A_log.reshape(-1),
        "dt_bias": None if dt_bias is None else dt_bias.reshape(value_heads, -1),
        "lower_bound": lower_bound,
    }


def check_lower_bound(required: bool, lower_bound: float | None) -> None:
    """Refuse a `safe_gate` without a lower bound that makes it safe.

    Raises:
        ValueError: in fla's words.
    """
    if not required:
        return
    if lower_bound is None:
        raise ValueError(
            "`lower_bound` must be specified when `safe_gate=True` and `use_gate_in_kernel=True`."
        )
    if not -5 <= lower_bound < 0:
        raise ValueError(f"`lower_bound` must be in the safe range [-5, 0), got {lower_bound}.")


def refuse_intermediate_states(asked: bool) -> None:
    """Refuse to return the states between chunks.

    Raises:
        NotImplementedError: they are asked for.
    """
    if asked:
        raise NotImplementedError("`return_intermediate_states` is not supported on a CPU.")
