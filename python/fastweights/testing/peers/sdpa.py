"""torch's causal softmax attention, the thing that linear attention replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastweights.testing.opspec import Peer, Sample, sample

__all__ = ["CAUSAL"]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _load() -> Callable[..., Any]:
    return _attention


def _adapt(call: Sample) -> Sample | None:
    q, k, v = (t.detach().transpose(1, 2).contiguous() for t in call.args[:3])
    groups = v.shape[1] // q.shape[1]
    if groups > 1:
        q, k = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
    elif v.shape[1] < q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return sample(*(t.requires_grad_(call.args[0].requires_grad) for t in (q, k, v)))


CAUSAL = Peer("torch causal SDPA", load=_load, adapt=_adapt, matmul=True)
