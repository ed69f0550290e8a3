"""Fused norms: the public functions and what torch must know about their ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights import _load  # noqa: F401  (defines torch.ops.fastweights)
from fastweights.ops import _common
from fastweights.ops.norms import reference
from fastweights.ops.norms.reference import Activation


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    r"""Root-mean-square normalisation of the last dimension.

    .. math::
        y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \mathrm{eps}}} \odot \mathrm{weight}

    (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.)

    Args:
        x: [..., D]; float32, bfloat16, float16 or float64. Up to four dimensions of any strides
            whose last one is contiguous are read without a copy.
        weight: [D], any floating dtype; None means ones. Everything is computed in float32
            (float64 for float64 x) and rounded once.
        eps: added to the mean square.

    Returns:
        y, contiguous, of x's shape and dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message says which.
        NotImplementedError: forward-mode differentiation or double backward; use
            `fastweights.reference.rms_norm`.

    Time is O(numel) and nothing is kept for the backward but x. Results are the same bits for any
    number of threads. Gradients reach x and weight.

    Example:
        >>> rms_norm(torch.full((2, 3), 5.0), eps=0.0)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    _common.refuse_forward_ad("rms_norm", x, weight)
    if _common.needs_reference(x, weight):
        return reference.rms_norm(x, weight, eps=eps)
    y: Tensor = torch.ops.fastweights.rms_norm(x, weight, eps=eps)
    return y


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    activation: Activation = "silu",
    eps: float = 1e-6,
) -> Tensor:
    r"""`rms_norm`, then an activated gate: the output of Gated DeltaNet, RetNet and GLA.

    .. math::
        y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \mathrm{eps}}} \odot \mathrm{weight}
        \odot \mathrm{act}(\mathrm{gate})

    The norm comes before the gate, as in Qwen3-Next and fla's FusedRMSNormGated (Mamba-2's norm
    comes after it, which is `rms_norm` of the gated x).

    Args:
        x: [..., D]; float32, bfloat16, float16 or float64. Up to four dimensions of any strides
            whose last one is contiguous are read without a copy, here and in gate.
        gate: of x's shape and dtype.
        weight: [D], any floating dtype; None means ones. Everything is computed in float32
            (float64 for float64 x) and rounded once.
        activation: "silu" or "sigmoid".
        eps: added to the mean square.

    Returns:
        y, contiguous, of x's shape and dtype.

    Raises:
        RuntimeError: shapes, dtypes, devices or an activation that do not fit.
        NotImplementedError: forward-mode differentiation or double backward; use
            `fastweights.reference.gated_rms_norm`.

    Time is O(numel) and nothing is kept for the backward but x and gate. Results are the same bits
    for any number of threads. Gradients reach x, gate and weight.

    Example:
        >>> x = torch.full((2, 3), 5.0)
        >>> gated_rms_norm(x, torch.zeros(2, 3), activation="sigmoid", eps=0.0)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """
    _common.refuse_forward_ad("gated_rms_norm", x, gate, weight)
    if _common.needs_reference(x, gate, weight):
        return reference.gated_rms_norm(x, gate, weight, activation=activation, eps=eps)
    y: Tensor = torch.ops.fastweights.gated_rms_norm(
        x, gate, weight, activation=activation, eps=eps
    )
    return y


def _like(x: Tensor, t: Tensor | None) -> Tensor:
    return x.new_empty((0,)) if t is None else t.new_empty(t.shape)


def _fake(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor]:
    return _like(x, x), _like(x, weight)


def _gated_fake(
    x: Tensor, gate: Tensor, weight: Tensor | None, *, activation: str, eps: float
) -> Tensor:
    return x.new_empty(x.shape)


def _gated_backward_fake(
    grad_y: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, *, activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, x), _like(x, x), _like(x, weight)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = torch.ops.fastweights.rms_norm_backward(grad_y, x, weight, **ctx.options)
    return dx, None if weight is None else dweight


def _gated_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    dx, dgate, dweight = torch.ops.fastweights.gated_rms_norm_backward(
        grad_y, x, gate, weight, **ctx.options
    )
    return dx, dgate, None if weight is None else dweight


torch.library.register_fake("fastweights::rms_norm", _fake)
torch.library.register_fake("fastweights::rms_norm_backward", _backward_fake)
torch.library.register_fake("fastweights::gated_rms_norm", _gated_fake)
torch.library.register_fake("fastweights::gated_rms_norm_backward", _gated_backward_fake)
torch.library.register_autograd("fastweights::rms_norm", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "fastweights::gated_rms_norm", _gated_backward, setup_context=_setup_context
)
_common.refuse_double_backward("rms_norm")
_common.refuse_double_backward("gated_rms_norm")
