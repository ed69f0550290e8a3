"""Gates and step sizes that differ between value channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Recurrence = Callable[..., tuple[Tensor, Any]]


def by_value_channel(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    state_v_first: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`recurrence` with a decay `gv` or a `beta` of its own for every value channel.

    The columns of a state do not mix, so each becomes the state of a value head of its own, with
    V = 1. That is exact and general, and no faster than V heads are.

    Args:
        recurrence: `linear_attention` or `delta_rule`.
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V].
        g: log-decay [B, T, HV] or [B, T, HV, K].
        gv: log-decay of the value channels [B, T, HV, V].
        beta: [B, T, HV] or [B, T, HV, V].
        initial_state: [N, HV, K, V], or [N, HV, V, K] with `state_v_first`.
        state_v_first: layout of both states.
        **options: what else `recurrence` takes.
    """
    B, T, HV, V = v.shape
    columns = HV * V

    decay = g if g is None else g.repeat_interleave(V, dim=2)
    if gv is not None:
        of_column = gv.flatten(2)
        if decay is None:
            decay = of_column
        else:
            decay = decay + (of_column if decay.dim() == 3 else of_column.unsqueeze(-1))
    if beta is not None:
        options["beta"] = beta.flatten(2) if beta.dim() == 4 else beta.repeat_interleave(V, dim=2)
    state = initial_state
    if state is not None:
        state = (state if state_v_first else state.mT).reshape(-1, columns, q.shape[-1], 1)
    o, final = recurrence(
        q, k, v.reshape(B, T, columns, 1), g=decay, initial_state=state, **options
    )
    if final is not None:
        final = final.reshape(-1, HV, V, q.shape[-1])
        final = final if state_v_first else final.mT
    return o.reshape(v.shape), final
