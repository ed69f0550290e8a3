"""Round to nearest, on a grid found by one of three rules; the grid is what other solvers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.functional import quantize
from fastweights.ops.quantization.layout import pack
from fastweights.ops.quantization.tensor import ACTIVATIONS, QuantizedTensor
from fastweights.quantization.calibrate import Solver
from fastweights.quantization.walk import Block

__all__ = ["RULES", "RoundToNearest", "minmax_grid", "round_to_nearest"]

RULES = ("search", "minmax", "mse")
"""Ways to find a group's scale and minimum."""

# The official search: ranges down to 20 % of the full one, and the exponent of the error.
_SHRINKS, _NORM = 80, 2.4


@dataclass(frozen=True)
class RoundToNearest(Solver):
    """Every weight to its nearest level; what the other solvers are measured against.

    Args:
        rule: of the grid, see `round_to_nearest`.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.quantization import RoundToNearest
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = fw.quantize_(model, solver=RoundToNearest("mse"), progress=False)
    """

    rule: str = "search"

    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rule("RoundToNearest", self.rule)

    def solve(self, block: Block, prepared: Mapping[str, Tensor]) -> None:
        """Rounds the layers of a block."""
        for name, linear in block.linears.items():
            block.replace(name, round_to_nearest(linear.weight, **block.target, rule=self.rule))


def round_to_nearest(
    w: Tensor,
    format: str = "int4",
    *,
    group_size: int | None = None,
    activation: str = "float",
    rule: str = "search",
) -> QuantizedTensor:
    """A weight rounded on a grid that one of three rules finds for every group of inputs.

    Args:
        w: ``[N, K]``, finite.
        format: see `fastweights.quantize`.
        group_size: see `fastweights.quantize`.
        activation: see `fastweights.quantize`.
        rule: "search", that of `fastweights.quantize`; "minmax", from the least to the largest
            weight of the group and 0, where 0 is a level (GPTQ's and most checkpoints'); or "mse",
            of 80 such ranges, down to 21 % of the full one, that of least ``sum |w - q|^2.4``.

    Raises:
        ValueError: an unknown format, activation or rule.
        RuntimeError: a weight that is not finite, or too large for float16 scales.
    """
    check_rule("round_to_nearest", rule)
    if rule == "search" or activation not in ACTIVATIONS:
        return quantize(w, format, group_size=group_size, activation=activation)
    check_grid("round_to_nearest", format, free=True)
    form, (n, k) = FORMATS[format], w.shape
    group_size = form.group_size if group_size is None else group_size
    missing = -k % group_size
    groups = torch.nn.functional.pad(w.detach().float(), (0, missing))
    groups = groups.unflatten(1, (-1, group_size))  # zeros change no range: 0 is inside anyway
    grid = minmax_grid(groups, form.extent, mse=rule == "mse")
    scale, minimum = (t.half().float() for t in grid)
    finite = (scale.isfinite() & minimum.isfinite()).flatten(1).all(1)
    if not finite.all():
        raise RuntimeError(
            "round_to_nearest: expected finite w within the range of float16, got an infinite or "
            f"NaN scale or minimum in output {int(finite.logical_not().nonzero()[0])}"
        )
    codes = nearest_codes(groups, scale, minimum, form.extent)
    if missing:
        codes[:, -1, group_size - missing :] = 0
    return pack(form.encode(codes), scale, minimum, format, (n, k), activation)


def minmax_grid(
    w: Tensor, extent: tuple[float, float], *, symmetric: bool = False, mse: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and minimum ``[..., 1]`` of groups ``[..., g]`` by the rule of the official GPTQ.

    The range holds 0, which is a level; all-zero groups get the range from -1 to 1.

    Args:
        w: ``[..., g]``.
        extent: least and largest code.
        symmetric: the range is ``[-a, a (Q - 1) / (Q + 1)]`` with Q + 1 levels and the magnitude a.
        mse: shrink the range to where ``sum |w - q|^2.4`` is least.
    """
    least, most = extent
    levels = most - least
    low = w.amin(-1, keepdim=True).clamp(max=0)
    high = w.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)

    def grid(share: float) -> tuple[Tensor, Tensor]:
        scale = (high - low) * share / levels
        zero = (levels + 1) / 2 if symmetric else (-low * share / scale).round()
        return scale, -scale * (zero + least)

    best = grid(1.0)
    if not mse:
        return best
    error = _error(w, *best, extent)
    for i in range(1, _SHRINKS):
        tried = grid(1 - i / 100)
        e = _error(w, *tried, extent)
        better = e < error
        best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))
        error = torch.minimum(e, error)
    return best


def nearest_codes(w: Tensor, scale: Tensor, minimum: Tensor, extent: tuple[float, float]) -> Tensor:
    """Codes of the levels nearest to w; a group of equal weights, whose scale is 0, has code 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return ((w - minimum) * inverse).round().clamp(*extent)


def check_rule(name: str, rule: str) -> None:
    """Raises unless `rule` is one of `RULES`."""
    if rule not in RULES:
        raise ValueError(f"{name}: expected rule in {list(RULES)}, got {rule!r}")


def check_grid(name: str, format: str, *, free: bool) -> None:
    """Raises unless the levels of a format are evenly spaced.

    Args:
        name: who asks.
        format: in question.
        free: whether any scale and minimum must do.
    """
    known = [f for f, form in FORMATS.items() if form.is_grid]
    if free:
        known = [f for f in known if FORMATS[f].parameters == "scale+minimum"]
    if format not in known:
        raise ValueError(f"{name}: expected format in {sorted(known)}, got {format!r}")


def _error(w: Tensor, scale: Tensor, minimum: Tensor, extent: tuple[float, float]) -> Tensor:
    q = scale * nearest_codes(w, scale, minimum, extent) + minimum
    return (w - q).abs().pow(_NORM).sum(-1, keepdim=True)
