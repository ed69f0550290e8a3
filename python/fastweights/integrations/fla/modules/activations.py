"""`fla.modules.activations`: what its autograd functions call, forward and backward.

An autograd function keeps its inputs and hands them to the backward here, together with the
gradient of its output. `output_contiguous` asks for what torch does anyhow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "logsigmoid_bwd",
    "logsigmoid_fwd",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "swiglu_fwd",
    "swiglu_fwdbwd",
    "swish_bwd",
    "swish_fwd",
]


def sigmoid_fwd(x: Tensor, output_contiguous: bool = False) -> Tensor:
    """Forward of `sigmoid`."""
    return x.sigmoid().contiguous()


def sigmoid_bwd(x: Tensor, dy: Tensor, output_contiguous: bool = False) -> Tensor:
    """Backward of `sigmoid`."""
    y = x.sigmoid()
    return (dy * y * (1 - y)).contiguous()


def logsigmoid_fwd(x: Tensor, temperature: float = 1.0, output_contiguous: bool = False) -> Tensor:
    """Forward of `logsigmoid`: log(sigmoid(x)) / temperature."""
    return (F.logsigmoid(x) / temperature).contiguous()


def logsigmoid_bwd(
    x: Tensor, dy: Tensor, temperature: float = 1.0, output_contiguous: bool = False
) -> Tensor:
    """Backward of `logsigmoid`."""
    return (dy * (-x).sigmoid() / temperature).contiguous()


def swish_fwd(x: Tensor, output_contiguous: bool = False) -> Tensor:
    """Forward of `swish`."""
    return F.silu(x).contiguous()


def swish_bwd(x: Tensor, dy: Tensor, output_contiguous: bool = False) -> Tensor:
    """Backward of `swish`."""
    dx: Tensor = torch.ops.aten.silu_backward(dy, x)
    return dx.contiguous()


def swiglu_fwd(x: Tensor, y: Tensor, output_contiguous: bool = False) -> Tensor:
    """Forward of `swiglu` and `swiglu_linear`: silu(x) y."""
    return (F.silu(x) * y).contiguous()


def swiglu_fwdbwd(
    x: Tensor, y: Tensor, g: Tensor, use_weight: bool = False, output_contiguous: bool = False
) -> tuple[Tensor, ...]:
    """Backward of `swiglu`: the gradients of x and y, with `use_weight` also silu(x) y."""
    act = F.silu(x)
    grads = torch.ops.aten.silu_backward(g * y, x).contiguous(), (g * act).contiguous()
    return (*grads, (act * y).contiguous()) if use_weight else grads
