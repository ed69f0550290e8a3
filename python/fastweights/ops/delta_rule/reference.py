"""The delta rule as its recurrence, token by token."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import softplus


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The definition of `fastweights.delta_rule`; see there for the arguments.

    S = diag(exp g) S,  d = beta (write * v) - S^T (beta (erase * k)),  S = S + k d^T,
    o = scale S^T q.
    """
    batch, length, heads, key_size = q.shape
    value_heads, value_size = v.shape[2:]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = key_size**-0.5 if scale is None else scale

    def per_value_head(x: Tensor) -> Tensor:
        x = x.to(dtype)
        if qk_l2norm:
            x = x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        return x.repeat_interleave(value_heads // heads, dim=2)

    queries, keys, values = scale * per_value_head(q), per_value_head(k), v.to(dtype)
    strength = _strength(beta, beta_sigmoid, allow_neg_eigval, values)
    erased = strength * (keys if erase is None else erase.to(dtype) * keys)
    targets = strength * (values if write is None else write.to(dtype) * values)
    decay = _decay(g, A_log, dt_bias, lower_bound, values)

    if cu_seqlens is None:
        sequences = [(b, 0, length) for b in range(batch)]
    else:
        sequences = [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]
    S0 = values.new_zeros(len(sequences), value_heads, key_size, value_size)
    if initial_state is not None:
        S0 = initial_state.to(dtype).mT if state_v_first else initial_state.to(dtype)

    outputs, finals = [], []
    for n, (b, start, end) in enumerate(sequences):
        S = S0[n]
        for t in range(start, end):
            S = decay[b, t, :, :, None] * S
            d = targets[b, t] - torch.einsum("hk,hkv->hv", erased[b, t], S)
            S = S + keys[b, t, :, :, None] * d[:, None, :]
            outputs.append(torch.einsum("hk,hkv->hv", queries[b, t], S))
        finals.append(S)
    out = torch.stack(outputs) if outputs else values
    out = out.reshape(values.shape).to(q.dtype)
    if not output_final_state:
        return out, None
    S = torch.stack(finals) if finals else S0
    return out, (S.mT if state_v_first else S)


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    state: Tensor,
    scale: float | None = None,
    qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
) -> Tensor:
    """The definition of `fastweights.delta_rule_step`: one token, ``state`` in place."""

    def timed(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dim() == 1 else x.unsqueeze(1)

    o, final = delta_rule(
        q.unsqueeze(1),
        k.unsqueeze(1),
        v.unsqueeze(1),
        beta=timed(beta),
        g=timed(g),
        erase=timed(erase),
        write=timed(write),
        scale=scale,
        qk_l2norm=qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        initial_state=state,
        output_final_state=True,
    )
    assert final is not None
    state.copy_(final)
    return o.squeeze(1)


def _strength(
    beta: Tensor | None, beta_sigmoid: bool, allow_neg_eigval: bool, like: Tensor
) -> Tensor:
    """Beta, broadcast to [B, T, HV, 1]."""
    if beta is None:
        return like.new_ones(()).expand(*like.shape[:3], 1)
    beta = beta.to(like.dtype)
    if beta_sigmoid:
        beta = (2 if allow_neg_eigval else 1) * beta.sigmoid()
    return beta.unsqueeze(-1)


def _decay(
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    like: Tensor,
) -> Tensor:
    """The decays exp(g), broadcast to [B, T, HV, 1 or K]."""
    if g is None:
        return like.new_ones(()).expand(*like.shape[:3], 1)
    g = g.to(like.dtype)
    if A_log is not None or lower_bound is not None:
        g = g if dt_bias is None else g + dt_bias.to(like.dtype)
        rate = like.new_ones(()) if A_log is None else A_log.to(like.dtype).exp()
        rate = rate[:, None] if A_log is not None and g.dim() == 4 else rate
        g = -rate * softplus(g) if lower_bound is None else lower_bound * (rate * g).sigmoid()
    return g.exp() if g.dim() == 4 else g.exp().expand(like.shape[:3]).unsqueeze(-1)
