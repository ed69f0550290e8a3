"""torch's depthwise convolution and SiLU: the short convolution as models write it today."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastweights.testing.opspec import Peer, Sample, sample

__all__ = ["COPY", "DEPTHWISE", "UPDATE"]


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels, width = weight.shape
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=width - 1, groups=channels)
    return F.silu(y[..., : x.shape[-1]])


def _update(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """As transformers' models do without a kernel."""
    seen = torch.cat([state, x], -1)
    state.copy_(seen[..., -state.shape[-1] :])
    y = F.conv1d(seen, weight.unsqueeze(1), bias, groups=weight.shape[0])
    return F.silu(y[..., -x.shape[-1] :])


def _load() -> Callable[..., Any]:
    return _depthwise


def _load_update() -> Callable[..., Any]:
    return _update


def _adapt(call: Sample) -> Sample:
    """Time contiguous, the order that torch is fast in, whatever ours is."""
    x, *parameters = (t.detach() for t in call.args)
    tensors = (x.transpose(1, 2).contiguous(), *parameters)
    return sample(*(t.requires_grad_(call.args[0].requires_grad) for t in tensors))


def _adapt_update(call: Sample) -> Sample:
    x, *parameters = call.args
    return sample(x.unsqueeze(-1), *parameters, call.kwargs["state"].clone())


# Not a rival but the floor: the same bytes read, and written to fresh memory.
COPY = Peer(
    "torch clone: a copy",
    load=lambda: torch.clone,
    adapt=lambda call: sample(call.args[0].detach()),
    backward=False,
)
DEPTHWISE = Peer("torch conv1d + silu", load=_load, adapt=_adapt)
UPDATE = Peer("transformers' fallback", load=_load_update, adapt=_adapt_update, backward=False)
