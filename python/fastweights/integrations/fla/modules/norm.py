"""`fla.modules.norm`: the functions that its norm layers call."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastweights.ops.norms.functional import gated_rms_norm as fused_gated_rms_norm
from fastweights.ops.norms.functional import rms_norm as fused_rms_norm
from fastweights.ops.norms.reference import Activation

__all__ = [
    "group_norm",
    "l2norm",
    "layer_norm",
    "layer_norm_gated",
    "layer_norm_linear",
    "rms_norm",
    "rms_norm_gated",
]

Normed = Tensor | tuple[Tensor, Tensor]


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Normed:
    """`rms_norm` of fla: `fastweights.rms_norm` of x plus a residual.

    Args:
        x: [..., D].
        weight: [D] or None.
        bias: [D] or None.
        residual: of x's shape, added first.
        eps: added to the mean square.
        prenorm: return the sum, too.
        residual_in_fp32: the sum is returned in float32 if there is no residual whose dtype it has.

    Returns:
        y of x's shape and dtype; with `prenorm` (y, x + residual).
    """
    return group_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True, 1)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Normed:
    """`layer_norm` of fla; see `rms_norm`."""
    return group_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm, 1)


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Normed:
    """`group_norm` of fla, each of `num_groups` parts of D by itself; see `rms_norm`.

    Raises:
        ValueError: D is no multiple of `num_groups`.
    """
    if x.shape[-1] % num_groups != 0:
        raise ValueError("num_channels must be divisible by num_groups")
    return _after_residual(
        lambda total: _norm(total, weight, bias, eps, is_rms_norm, num_groups),
        x,
        residual,
        prenorm,
        residual_in_fp32,
    )


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Normed:
    """`rms_norm_gated` of fla: `rms_norm`, times the activated gate `g` [..., D].

    `activation` is "swish", "silu" or "sigmoid"; see `rms_norm` for the rest.
    """
    return _after_residual(
        lambda total: _gated_norm(total, g, weight, bias, activation, eps, True),
        x,
        residual,
        prenorm,
        residual_in_fp32,
    )


def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Normed:
    """`layer_norm_gated` of fla; see `rms_norm_gated`."""
    return _after_residual(
        lambda total: _gated_norm(total, g, weight, bias, activation, eps, False),
        x,
        residual,
        prenorm,
        residual_in_fp32,
    )


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Normed:
    """`layer_norm_linear` of fla, which its other norms before a linear layer call, too."""
    normed = group_norm(
        x, norm_weight, norm_bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm, num_groups
    )
    y, total = normed if isinstance(normed, tuple) else (normed, None)
    y = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return y if total is None else (y, total)


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """`l2norm` of fla: x / sqrt(sum of squares + eps) over the last dimension."""
    size = x.shape[-1]
    y = fused_rms_norm(x, x.new_full((size,), size**-0.5, dtype=_wide(x)), eps=eps / size)
    return y if output_dtype is None else y.to(output_dtype)


def _after_residual(
    norm: Callable[[Tensor], Tensor],
    x: Tensor,
    residual: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
) -> Normed:
    """`norm` of x + residual in x's dtype, and the sum in that of the residual."""
    if residual is None:
        total, dtype = x, torch.float32 if residual_in_fp32 else x.dtype
    else:
        dtype = residual.dtype
        total = x.to(_wide(x)) + residual
    y = norm(total).to(x.dtype)
    return (y, total.to(dtype)) if prenorm else y


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    is_rms_norm: bool,
    num_groups: int,
) -> Tensor:
    if is_rms_norm and bias is None and num_groups == 1:
        return fused_rms_norm(x, weight, eps=eps)
    groups = x.to(_wide(x)).unflatten(-1, (num_groups, -1))
    if is_rms_norm:
        y = fused_rms_norm(groups, eps=eps)
    else:
        y = F.layer_norm(groups, groups.shape[-1:], eps=eps)
    y = y.flatten(-2)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _gated_norm(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    eps: float,
    is_rms_norm: bool,
) -> Tensor:
    if is_rms_norm and bias is None:
        dtype = torch.promote_types(x.dtype, g.dtype)
        act: Activation = "sigmoid" if activation == "sigmoid" else "silu"
        return fused_gated_rms_norm(x.to(dtype), g.to(dtype), weight, activation=act, eps=eps)
    gate = g.to(_wide(x))
    gate = torch.sigmoid(gate) if activation == "sigmoid" else F.silu(gate)
    return _norm(x.to(gate.dtype), weight, bias, eps, is_rms_norm, 1) * gate


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
