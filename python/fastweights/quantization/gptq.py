"""GPTQ: rounding that makes up for what it has rounded so far."""

from __future__ import annotations

import torch
from torch import Tensor

from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.functional import quantize
from fastweights.ops.quantization.layout import unpack, with_codes
from fastweights.ops.quantization.tensor import QuantizedTensor

__all__ = ["gptq", "round_columns"]

_BLOCK = 128
# Tries at a Hessian that is not positive definite in float64, with ten times the damping each.
_DAMPINGS = 5


def gptq(
    w: Tensor,
    hessian: Tensor,
    format: str = "int4",
    *,
    group_size: int | None = None,
    activation: str = "float",
    damping: float = 0.01,
    act_order: bool = True,
) -> QuantizedTensor:
    """Quantize a weight so that its *outputs* change least: ``min ||(W - Q) X||^2`` (GPTQ, 2022).

    Columns are rounded one after another; the error of each is passed on to the columns that are
    not rounded yet, along the inverse Hessian. Scales and minima are those that `quantize` finds
    (static groups), so that a weight on its grid already stays as it is.

    Args:
        w: ``[N, K]``, finite.
        hessian: ``[K, K]``, ``X X^T`` of inputs X ``[K, tokens]`` in any scale; inputs that never
            occur have a zero on the diagonal.
        format: see `fastweights.quantize`; one whose levels are evenly spaced, such as "int4".
        group_size: see `fastweights.quantize`.
        activation: see `fastweights.quantize`.
        damping: of the Hessian, a share of the mean of its diagonal.
        act_order: round the inputs of largest second moment first, while most columns are left to
            make up for it.

    Returns:
        QuantizedTensor, read as fast as any other.

    Raises:
        ValueError: a Hessian of another shape or not finite, a format without a grid.

    Cost: N K² operations and a Cholesky factorisation of ``[K, K]`` in float64.
    """
    k = w.shape[-1]
    if hessian.shape != (k, k) or not bool(torch.isfinite(hessian).all()):
        raise ValueError(
            f"gptq: expected a finite hessian of shape [{k}, {k}], got {list(hessian.shape)}"
        )
    if format in FORMATS and not FORMATS[format].is_grid:
        known = sorted(name for name, form in FORMATS.items() if form.is_grid)
        raise ValueError(f"gptq: expected format in {known}, got {format!r}")
    grid = quantize(w, format, group_size=group_size, activation=activation)
    codes, scale, minimum = unpack(grid)
    form = FORMATS[grid.format]
    groups = torch.arange(k, device=w.device) // grid.group_size
    rounded = round_columns(
        w.detach().float(),
        hessian,
        scale[..., 0][:, groups],
        minimum[..., 0][:, groups],
        form.extent,
        damping=damping,
        act_order=act_order,
    )
    codes.flatten(1)[:, :k] = form.encode(rounded)
    return with_codes(grid, codes)


def round_columns(
    w: Tensor,
    hessian: Tensor,
    scale: Tensor,
    minimum: Tensor,
    code_range: tuple[float, float],
    *,
    damping: float = 0.01,
    act_order: bool = False,
    block: int = _BLOCK,
) -> Tensor:
    """Codes ``[N, K]`` of a weight on a given grid: algorithm 1 of the paper.

    Args:
        w: float32 ``[N, K]``.
        hessian: ``[K, K]``.
        scale: ``[N, K]``, of every weight's group; 0 for a group of equal weights.
        minimum: ``[N, K]``; a weight is ``scale * code + minimum``.
        code_range: least and largest code.
        damping: see `gptq`.
        act_order: see `gptq`.
        block: columns between updates of everything to their right; of no effect on the result but
            for rounding.
    """
    order = torch.arange(w.shape[1], device=w.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    u = _inverse_factor(hessian[order][:, order], damping)
    w = w[:, order]  # indexing copies
    scale, minimum = scale[:, order], minimum[:, order]
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = torch.empty_like(w)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors = w.new_empty(w.shape[0], stop - start)
        for i in range(start, stop):
            code = ((w[:, i] - minimum[:, i]) * inverse[:, i]).round().clamp(*code_range)
            error = (w[:, i] - (scale[:, i] * code + minimum[:, i])) / u[i, i]
            w[:, i:stop].addr_(error, u[i, i:stop], alpha=-1)
            codes[:, i], errors[:, i - start] = code, error
        w[:, stop:].addmm_(errors, u[start:stop, stop:], alpha=-1)
    return codes[:, order.argsort()]


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with ``H⁻¹ = Uᵀ U`` for the damped Hessian; float32 of float64."""
    h = hessian.double()
    diagonal = h.diagonal()
    h = h + torch.diag((diagonal == 0).double())
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    for attempt in range(_DAMPINGS):
        damped = h + torch.diag((damping * 10**attempt * mean).expand(len(h)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            u: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return u.float()
    raise ValueError("gptq: expected a positive semidefinite hessian, got one that is not")
