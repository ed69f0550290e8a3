"""`fla.ops.gated_delta_rule`: Gated DeltaNet, the delta rule on a state that decays first."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from fastweights.integrations.fla.ops import _arguments
from fastweights.integrations.fla.ops._columns import by_value_channel
from fastweights.ops.delta_rule.functional import delta_rule

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_delta_rule` of fla by `fastweights.delta_rule`.

    The order of `g` and `beta` is the op's; fla's naive recurrent reference has them the other way
    round.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V], HV a multiple of H; value head j reads head j // (HV / H).
        g: log-decay [B, T, HV], raw with `use_gate_in_kernel`.
        beta: [B, T, HV], raw with `use_beta_sigmoid_in_kernel`.
        scale: of q; None means K ** -0.5.
        initial_state: [N, HV, K, V], any floating dtype.
        output_final_state: also return the last state, else None.
        use_qk_l2norm_in_kernel: divide q and k by their norms first.
        use_beta_sigmoid_in_kernel: take the sigmoid of `beta`.
        allow_neg_eigval: twice that sigmoid.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1], B = 1.
        cu_seqlens_cpu: ignored.
        chunk_indices: ignored.
        cp_context: only None.
        **kwargs: `use_gate_in_kernel` makes the decay -exp(A_log) softplus(g + dt_bias), `A_log`
            [HV] and `dt_bias` [HV] or None; without it the two are ignored. `chunk_size`, 16, 32 or
            64, has no effect. Others are ignored, as by fla.

    Returns:
        o [B, T, HV, V] in q's dtype and the final state in float32.

    Raises:
        ValueError: heads that do not fit, packing with B > 1, a wrong number of states, another
            chunk size, `allow_neg_eigval` alone.
        AssertionError: `use_gate_in_kernel` without `A_log`.
        DeprecationWarning: `head_first`.
        NotImplementedError: `cp_context`.
    """
    state_v_first = _arguments.layout(state_v_first, kwargs)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            "q and k must have the same number of heads, "
            f"but got q.shape[2]={q.shape[2]} and k.shape[2]={k.shape[2]}"
        )
    H, HV = q.shape[2], v.shape[2]
    if HV % H != 0:
        raise ValueError(
            f"For GVA, num_v_heads (HV={HV}) must be evenly divisible by num_heads (H={H}), "
            f"but got HV % H = {HV % H}"
        )
    _arguments.refuse_head_first(kwargs)
    chunk_size = kwargs.get("chunk_size", 64)
    if chunk_size not in (16, 32, 64):
        raise ValueError(
            f"`chunk_size` must be 16, 32, or 64 for Gated Delta Rule, got {chunk_size}."
        )
    _arguments.refuse_context_parallel(cp_context)
    _arguments.check_packing(q, cu_seqlens, initial_state)
    gated = kwargs.get("use_gate_in_kernel", False)
    A_log = kwargs.get("A_log") if gated else None
    _arguments.expect(
        not gated or A_log is not None, "A_log must be provided when use_gate_in_kernel=True."
    )
    _arguments.refuse_negative_eigenvalues_without_sigmoid(
        allow_neg_eigval, use_beta_sigmoid_in_kernel
    )
    return delta_rule(
        q,
        k,
        v,
        beta=beta,
        g=g,
        scale=scale,
        qk_l2norm=use_qk_l2norm_in_kernel,
        A_log=A_log,
        dt_bias=kwargs.get("dt_bias") if gated else None,
        beta_sigmoid=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        initial_state=_arguments.state(initial_state, q),
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_gated_delta_rule` of fla, with a backward; see `chunk_gated_delta_rule`.

    Besides `g` the state can decay by key channel, `gk` [B, T, HV, K], and by value channel, `gv`
    [B, T, HV, V]. `beta` None is 1; [B, T, HV, V] is one per value channel. What goes by value
    channel costs a head for each of them.

    Raises:
        ValueError: packing with B > 1, a wrong number of states, `use_gate_in_kernel` without
            `A_log` or `g`, `allow_neg_eigval` alone, a `gk` or `gv` of another shape.
    """
    state_v_first = _arguments.layout(state_v_first, kwargs)
    _arguments.check_packing(q, cu_seqlens, initial_state)
    if use_gate_in_kernel:
        if A_log is None:
            raise ValueError("`A_log` must be provided when `use_gate_in_kernel=True`.")
        if g is None:
            raise ValueError(
                "`g` (raw pre-activation) must be provided when `use_gate_in_kernel=True`."
            )
    _arguments.refuse_negative_eigenvalues_without_sigmoid(
        allow_neg_eigval, use_beta_sigmoid_in_kernel
    )
    for name, gate, width in (("gk", gk, k.shape[-1]), ("gv", gv, v.shape[-1])):
        # The fifth positional argument is `gk`, and not `beta` as in the chunk function.
        if gate is not None and gate.shape != (*v.shape[:3], width):
            raise ValueError(
                f"`{name}` must have shape {[*v.shape[:3], width]}, got {list(gate.shape)}."
            )
    options: dict[str, Any] = {
        "beta": q.new_ones(v.shape[:3]) if beta is None else beta,
        "scale": scale,
        "qk_l2norm": use_qk_l2norm_in_kernel,
        "beta_sigmoid": use_beta_sigmoid_in_kernel,
        "allow_neg_eigval": allow_neg_eigval,
        "initial_state": _arguments.state(initial_state, q),
        "output_final_state": output_final_state,
        "state_v_first": state_v_first,
        "cu_seqlens": cu_seqlens,
    }
    by_column = gv is not None or (beta is not None and beta.dim() == 4)
    if not by_column and gk is None:
        if use_gate_in_kernel:
            options |= {"A_log": A_log, "dt_bias": dt_bias}
        return delta_rule(q, k, v, g=g, **options)
    if use_gate_in_kernel:
        assert g is not None and A_log is not None
        g = _decay(g, A_log, dt_bias)
    if gk is not None:
        g = gk if g is None else gk + g.unsqueeze(-1)
    if by_column:
        return by_value_channel(delta_rule, q, k, v, g=g, gv=gv, **options)
    return delta_rule(q, k, v, g=g, **options)


def _decay(g: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
    """The log-decay of a raw gate, where it meets another one."""
    wide = g.to(_arguments.state_dtype(g))
    wide = wide if dt_bias is None else wide + dt_bias
    return -A_log.to(wide.dtype).exp() * softplus(wide)


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule
