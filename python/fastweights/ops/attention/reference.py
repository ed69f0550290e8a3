"""Window and hybrid attention as the equations say it: T × T matrices, a sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastweights.ops.attention.state import (
    HybridState,
    Layout,
    first_in_window,
    leaves_at,
    per_channel,
    ring_size,
    state_after,
    state_dtype,
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over 0 <= i − j < window, or |i − j| < window if not causal."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    length, dtype = q.shape[1], state_dtype(q.dtype)
    k, v = (_per_query_head(x.to(dtype), q.shape[2]) for x in (k, v))
    sequence = _sequence_of_token(length, cu_seqlens, q.device)
    i = torch.arange(length, device=q.device)
    distance = i[:, None] - i
    visible = (distance < window) & (distance > -window) & (sequence[:, None] == sequence)
    if causal:
        visible &= distance >= 0
    scores = torch.einsum("bihk,bjhk->bhij", q.to(dtype), k) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(scores, -1)  # [B, HQ, T]
    o = torch.einsum("bhij,bjhv->bihv", (scores - lse[..., None]).exp(), v).to(q.dtype)
    return (o, lse.transpose(1, 2)) if return_lse else o


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qf: Tensor,
    kf: Tensor,
    mix: Tensor,
    g: Tensor | None = None,
    *,
    window: int,
    layout: Layout = "sliding",
    scale: float | None = None,
    sink: Tensor | None = None,
    initial_state: HybridState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, HybridState | None]:
    """LoLCATs (2024), eq. 6-7, with a decay: see `fastweights.functional.hybrid_attention`."""
    batch, length, _, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    dtype, ring = state_dtype(q.dtype), ring_size(window, layout)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if g is not None and g.dim() == 1:
        g = g.expand(batch, length, -1)
    constant = g is not None and g.dim() == 2  # [HS, F]
    state_heads = max(kf.shape[2], 0 if g is None else g.shape[0 if constant else 2])
    if initial_state is None:
        S0 = q.new_zeros(rows, state_heads, qf.shape[-1], v.shape[-1], dtype=dtype)
        z0 = q.new_zeros(rows, state_heads, qf.shape[-1], dtype=dtype)
        position = torch.zeros(rows, dtype=torch.int64, device=q.device)
    else:
        S0, z0, position = initial_state.S, initial_state.z, initial_state.position

    outputs, S, z = [], [], []
    for n in range(rows):
        if cu_seqlens is None:
            b, tokens = n, slice(None)
        else:
            b, tokens = 0, slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        start = int(position[n])
        past = torch.arange(max(0, start - ring), start, device=q.device)
        keys = []
        for x, name in ((k, "k"), (v, "v"), (kf, "kf")):
            x = x[b, tokens].to(dtype)
            if initial_state is not None:
                x = torch.cat((getattr(initial_state, name)[n, :, past % ring].transpose(0, 1), x))
            keys.append(x)
        o_n, S_n, z_n = _hybrid_sequence(
            q[b, tokens].to(dtype), keys[0], keys[1], qf[b, tokens].to(dtype), keys[2],
            mix.to(dtype), g if g is None else (g[None] if constant else g[b, tokens]).to(dtype),
            None if sink is None else sink[b, tokens].to(dtype),
            S0[n], z0[n], start, len(past), window, layout, scale,
        )  # fmt: skip
        outputs.append(o_n)
        S.append(S_n)
        z.append(z_n)
    if rows == 0:
        o, S_end, z_end = q.new_zeros(*q.shape[:3], v.shape[-1]), S0, z0
    else:
        o = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
        S_end, z_end = torch.stack(S), torch.stack(z)
    if not output_final_state:
        return o.to(q.dtype), None
    state = state_after(k, v, kf, S_end, z_end, initial_state, window, layout, cu_seqlens)
    return o.to(q.dtype), state


def hybrid_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qf: Tensor,
    kf: Tensor,
    mix: Tensor,
    g: Tensor | None = None,
    *,
    state: HybridState,
    window: int,
    scale: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """`hybrid_attention` on a sequence of one token, the state updated in place."""
    if g is not None and g.dim() == 2 and not per_channel(g, k, qf):
        g = g[:, None]
    o, new = hybrid_attention(
        q[:, None], k[:, None], v[:, None], qf[:, None], kf[:, None], mix, g,
        window=window, layout="sliding" if state.k.shape[2] == window else "terraced", scale=scale,
        sink=None if sink is None else sink[:, None], initial_state=state, output_final_state=True,
    )  # fmt: skip
    assert new is not None
    for old, now in zip(state.tensors(), new.tensors(), strict=True):
        old.copy_(now)
    return o[:, 0]


def _hybrid_sequence(
    q: Tensor,  # [T, HQ, K], the queries at start ... start + T - 1
    k: Tensor,  # [P + T, HKV, K], the keys at start - P ... start + T - 1
    v: Tensor,
    qf: Tensor,
    kf: Tensor,
    mix: Tensor,
    g: Tensor | None,  # [T, HS], or [1, HS, F] for every token
    sink: Tensor | None,  # [T, HQ]
    S: Tensor,  # [HS, F, V]
    z: Tensor,
    start: int,
    past: int,
    window: int,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    length, heads = q.shape[:2]
    if length == 0:
        return q.new_zeros(0, heads, v.shape[-1]), S, z
    i = start + torch.arange(length, device=q.device)
    j = start - past + torch.arange(past + length, device=q.device)
    left = leaves_at(j, window, layout)
    in_window = (first_in_window(i, window, layout)[:, None] <= j) & (j <= i[:, None])
    in_linear = (start <= left) & (left <= i[:, None])  # keys that had left before `start` are in S
    in_state = (start <= left) & (left < start + length)

    # decay[h, a, b] = exp(Σ_{b <= s < a} g_s): query i reads a = i - start + 1, key j enters at
    # b = left_j - start + 1, the initial state at b = 0.
    if g is None:
        segments = q.new_zeros(1, length + 1, length + 1, 1)
    elif g.dim() == 2:
        segments = _segment_sums(g)[..., None]
    else:
        steps = torch.arange(length + 1, device=q.device)
        steps = (steps[:, None] - steps)[..., None]
        segments = torch.where(steps > 0, steps * g.transpose(0, 1)[:, None], 0)
    decay = _per_query_head(segments.exp(), S.shape[0], 0)  # [HS, T + 1, T + 1, F or 1]
    entry = (left - start + 1).clamp(0, length)
    pair_decay = _per_query_head(decay, heads, 0)[:, 1:, entry]  # [HQ, T, P + T, F or 1]

    scores = scale * torch.einsum("ihk,jhk->hij", q, _per_query_head(k, heads))
    scores = scores.masked_fill(~in_window, -torch.inf)
    if sink is not None:  # one more key of the window, whose value is zero
        scores = torch.cat((scores, sink.T[..., None]), -1)
    m = scores.amax(-1, keepdim=True)
    softmax_part = mix[:, None, None] * (scores - m).exp()
    if pair_decay.shape[-1] == 1:
        similarity = torch.einsum("ihf,jhf->hij", qf, _per_query_head(kf, heads))
        similarity = similarity * pair_decay[..., 0]
    else:
        similarity = torch.einsum("ihf,jhf,hijf->hij", qf, _per_query_head(kf, heads), pair_decay)
    weights = softmax_part[..., : len(j)] + torch.where(in_linear, similarity, 0)
    sink_part = softmax_part[..., len(j) :].sum(-1)
    from_state = qf * _per_query_head(decay[:, 1:, 0], heads, 0).transpose(0, 1)  # [T, HQ, F]

    num = torch.einsum("hij,jhv->ihv", weights, _per_query_head(v, heads))
    num = num + torch.einsum("ihf,hfv->ihv", from_state, _per_query_head(S, heads, 0))
    den = (weights.sum(-1) + sink_part).T
    den = den + torch.einsum("ihf,hf->ih", from_state, _per_query_head(z, heads, 0))

    kf, v = (_per_query_head(x, S.shape[0]) for x in (kf, v))
    kept = torch.where(in_state[:, None], decay[:, length, entry], 0).transpose(0, 1) * kf
    last = decay[:, length, 0]
    S = last[..., None] * S + torch.einsum("jhf,jhv->hfv", kept, v)
    z = last * z + kept.sum(0)
    return num / den[..., None], S, z


def _segment_sums(g: Tensor) -> Tensor:
    """`[T, H]` to `[H, T + 1, T + 1]`: entry (a, b) is the sum of g_s over b <= s < a.

    A sum over each segment, not a difference of two running sums: −inf would turn that into NaN.
    """
    length, heads = g.shape
    a = torch.arange(1, length + 1, device=g.device)
    b = torch.arange(length + 1, device=g.device)
    terms = torch.where(b < a[:, None], g.T[:, :, None], 0)
    return torch.cat((g.new_zeros(heads, 1, length + 1), terms.cumsum(1)), 1)


def _per_query_head(x: Tensor, heads: int, dim: int = -2) -> Tensor:
    """Repeats the head dimension so that query head h reads head h // (heads / H)."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def _sequence_of_token(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """`[T]`: which packed sequence a token belongs to."""
    t = torch.arange(length, device=device)
    if cu_seqlens is None:
        return torch.zeros_like(t)
    return torch.searchsorted(cu_seqlens.to(torch.int64), t, right=True)
