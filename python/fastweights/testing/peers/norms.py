"""Norms as torch and transformers compute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastweights.testing.opspec import Peer, Sample

__all__ = ["GATED", "QWEN3_NEXT", "RMS_NORM"]

_EPS = 1e-6


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, _EPS)


def _gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return _rms_norm(x, weight) * F.silu(gate)


def _load_qwen3_next() -> Callable[..., Any]:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    def gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        module = Qwen3NextRMSNormGated(0, eps=_EPS)
        del module.weight
        module.weight = weight
        y: Tensor = module(x, gate)
        return y

    return gated


def _same(call: Sample) -> Sample:
    return call


RMS_NORM = Peer("torch F.rms_norm", load=lambda: _rms_norm, adapt=_same)
GATED = Peer("torch F.rms_norm, silu", load=lambda: _gated, adapt=_same)
QWEN3_NEXT = Peer("transformers Qwen3-Next", load=_load_qwen3_next, adapt=_same)
