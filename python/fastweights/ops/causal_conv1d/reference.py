"""Causal depthwise convolution as its sum over taps, sequence by sequence."""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "swish"] | None


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _convolved(seen: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """From [W - 1 + L, D] to [L, D]: act(bias + Σ_w weight[:, w] seen[t + w])."""
    width = weight.shape[1]
    length = seen.shape[0] - width + 1
    y = sum((weight[:, w] * seen[w : w + length] for w in range(width)), torch.zeros(()))
    y = y if bias is None else y + bias
    return F.silu(y) if activation in ("silu", "swish") else y


def _sequences(
    x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[int, int, int, int | None, int | None]]:
    """(batch entry, begin, end, row of the initial state, row of the final state)."""
    batch, length = x.shape[:2]
    if cu_seqlens is not None:
        return [(0, *ends, n, n) for n, ends in enumerate(pairwise(cu_seqlens.tolist()))]
    found: list[tuple[int, int, int, int | None, int | None]] = []
    for b in range(batch):
        index = [0] * length if seq_idx is None else seq_idx[b].tolist()
        changes = [t for t in range(1, length) if index[t] != index[t - 1]]
        for begin, end in pairwise([0, *changes, length]):
            found.append((b, begin, end, None if begin else b, b if end == length else None))
    return found


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The definition of `fastweights.causal_conv1d`; see there for the arguments.

    y_t = act(bias + Σ_w weight_w x_{t-W+1+w}) + residual_t.
    """
    dtype = _computed_in(x)
    width = weight.shape[1]
    kept = width - 1 if initial_state is None else initial_state.shape[2]
    taps, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
    outputs, finals = [], []
    for b, begin, end, initial, final in _sequences(x, seq_idx, cu_seqlens):
        past = x.new_zeros(kept, x.shape[2])
        if initial_state is not None and initial is not None:
            past = initial_state[initial].T
        seen = torch.cat([past, x[b, begin:end]])
        outputs.append(_convolved(seen[kept - width + 1 :].to(dtype), taps, offset, activation))
        if final is not None:
            finals.append(seen[seen.shape[0] - kept :].T)
    y = torch.cat(outputs).view(x.shape) if outputs else x.to(dtype)
    y = y if residual is None else y + residual.to(dtype)
    if not output_final_state:
        return y.to(x.dtype), None
    return y.to(x.dtype), torch.stack(finals) if finals else x.new_zeros(0, x.shape[2], kept)


def _slots(state: Tensor, seen: Tensor) -> Tensor:
    """Where rings keep their S latest inputs after `seen` [B]: number t is in slot t mod S."""
    size = state.shape[2]
    latest = seen[:, None] + torch.arange(size, device=seen.device)
    return (latest % max(size, 1)).long()[:, None].expand_as(state)


def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor,
    activation: Activation = None,
    residual: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The definition of `fastweights.causal_conv1d_update`; see there for the arguments."""
    tokens = x.unsqueeze(1) if x.dim() == 2 else x
    latest = state if conv_state_indices is None else state[conv_state_indices]
    if cache_seqlens is not None:
        latest = latest.gather(2, _slots(latest, cache_seqlens))
    y, moved = causal_conv1d(
        tokens,
        weight,
        bias,
        activation=activation,
        residual=residual if residual is None else residual.view(tokens.shape),
        initial_state=latest,
        output_final_state=True,
    )
    assert moved is not None
    if cache_seqlens is not None:
        slots = _slots(moved, cache_seqlens + tokens.shape[1])
        moved = torch.empty_like(moved).scatter_(2, slots, moved)
    if conv_state_indices is None:
        state.copy_(moved)
    else:
        state[conv_state_indices] = moved
    return y.view(x.shape)
