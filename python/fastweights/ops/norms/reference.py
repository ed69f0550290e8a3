"""Root-mean-square normalisation as its equation."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "sigmoid"]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _normalized(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = _wide(x)
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return n if weight is None else n * weight.to(n.dtype)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """The definition of `fastweights.rms_norm`: x / √(mean(x²) + eps) · weight."""
    return _normalized(x, weight, eps).to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    activation: Activation = "silu",
    eps: float = 1e-6,
) -> Tensor:
    """The definition of `fastweights.gated_rms_norm`: rms_norm(x) · act(gate)."""
    act = F.silu if activation == "silu" else torch.sigmoid
    return (_normalized(x, weight, eps) * act(_wide(gate))).to(x.dtype)
