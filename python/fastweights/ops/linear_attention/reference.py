"""Linear attention as its recurrence, token by token."""

from itertools import pairwise

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, Tensor]


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: State | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """The definition of `fastweights.linear_attention`; see there for the arguments.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  z_t = exp(g_t) z_{t-1} + k_t,
    o_t = scale S_t^T q_t, divided by (scale q_t . z_t + eps) with ``normalize``.
    """
    batch, length, heads, key_size = q.shape
    value_heads, value_size = v.shape[2:]
    dtype = _computed_in(q)
    group = value_heads // heads
    scale = key_size**-0.5 if scale is None else scale

    def per_value_head(x: Tensor) -> Tensor:
        return x.to(dtype).repeat_interleave(group, dim=2)

    queries, keys, values = scale * per_value_head(q), per_value_head(k), v.to(dtype)
    decay = _decay(g, values.shape[:3], dtype)

    if cu_seqlens is None:
        sequences = [(b, 0, length) for b in range(batch)]
    else:
        ends = cu_seqlens.tolist()
        sequences = [(0, start, end) for start, end in pairwise(ends)]

    S0 = values.new_zeros(len(sequences), value_heads, key_size, value_size)
    z0 = values.new_zeros(len(sequences), value_heads, key_size)
    if initial_state is not None:
        given = initial_state if isinstance(initial_state, tuple) else (initial_state, z0)
        S0 = given[0].to(dtype).mT if state_v_first else given[0].to(dtype)
        z0 = given[1].to(dtype)

    outputs, S_final, z_final = [], [], []
    for n, (b, start, end) in enumerate(sequences):
        S, z = S0[n], z0[n]
        o: dict[int, Tensor] = {}
        for t in reversed(range(start, end)) if reverse else range(start, end):
            S = decay[b, t, :, :, None] * S + keys[b, t, :, :, None] * values[b, t, :, None, :]
            z = decay[b, t] * z + keys[b, t]
            o[t] = torch.einsum("hk,hkv->hv", queries[b, t], S)
            if normalize:
                o[t] = o[t] / ((queries[b, t] * z).sum(-1, keepdim=True) + eps)
        outputs += [o[t] for t in range(start, end)]
        S_final.append(S)
        z_final.append(z)

    out = torch.stack(outputs) if outputs else values
    out = out.reshape(values.shape).to(q.dtype)
    if not output_final_state:
        return out, None
    S = torch.stack(S_final) if S_final else S0
    S = S.mT if state_v_first else S
    return out, ((S, torch.stack(z_final) if z_final else z0) if normalize else S)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    state: State,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """The definition of `fastweights.linear_attention_step`: one token, ``state`` in place."""
    gate = g if g is None or g.dim() == 1 else g.unsqueeze(1)
    o, final = linear_attention(
        q.unsqueeze(1),
        k.unsqueeze(1),
        v.unsqueeze(1),
        gate,
        scale=scale,
        normalize=normalize,
        eps=eps,
        initial_state=state,
        output_final_state=True,
    )
    for old, new in zip(_parts(state), _parts(final), strict=True):
        old.copy_(new)
    return o.squeeze(1)


def _decay(g: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """exp(g), broadcast to [B, T, HV, 1 or K]."""
    if g is None:
        return torch.ones((), dtype=dtype).expand(*shape, 1)
    return g.to(dtype).exp() if g.dim() == 4 else g.to(dtype).exp().expand(shape).unsqueeze(-1)


def _parts(state: State | None) -> tuple[Tensor, ...]:
    return () if state is None else state if isinstance(state, tuple) else (state,)
