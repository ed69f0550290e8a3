"""AWQ: scales that spend the levels of a group where the activations are large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastweights.ops.quantization.functional import dequantize
from fastweights.quantization.calibrate import Solver
from fastweights.quantization.round_to_nearest import check_rule, round_to_nearest
from fastweights.quantization.scaling import Fold, find_folds, fold_scale, restored
from fastweights.quantization.walk import Block

__all__ = ["AWQ"]

# In the last part of a name: projections whose outputs meet in a product; their clipping does more
# harm than good (AutoAWQ).
_NOT_CLIPPED = ("q_", "k_", "query", "key", "Wqkv")


@dataclass(frozen=True)
class AWQ(Solver):
    """Activation-aware weight quantization (2023): scale, clip, round to nearest.

    Layers that share an input are multiplied by ``s = x^r / w^(1 - r)`` per channel, what feeds
    them divided by it; x is the mean magnitude of the channel's activations, w that of its weights
    relative to their group, r the one of a grid that changes the block's output least. Then every
    group is clipped as far as that lowers the error of the layer's output, and rounded.

    Args:
        steps: of the grid of r in [0, 1).
        clips: shares of a group's largest magnitude, from 1 in steps of 1/20, that are tried; 1 is
            without clipping.
        samples: whose outputs are compared in the search of r; the clipping sees all.
        rule: of the grid, see `round_to_nearest`.

    Raises:
        ValueError: values out of range.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.quantization import AWQ
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
        >>> x = torch.randn(8, 16, 64)
        >>> model = fw.quantize_(model, "int4", solver=AWQ(), calibration=x, progress=False)
    """

    steps: int = 20
    clips: int = 10
    samples: int = 2
    rule: str = "search"

    def __post_init__(self) -> None:
        for name, most in (("steps", None), ("clips", 20), ("samples", None)):
            value = getattr(self, name)
            if value < 1 or (most is not None and value > most):
                bound = ">= 1" if most is None else f"in [1, {most}]"
                raise ValueError(f"AWQ: expected {name} {bound}, got {value}")
        check_rule("AWQ", self.rule)

    def solve(self, block: Block, prepared: Mapping[str, Tensor]) -> None:
        """Scales, clips and rounds the layers of a block."""
        for fold in find_folds(block):
            scale = self.search(block, fold)
            if scale is not None:
                readers = [block.linears[name] for name in fold.linears]
                fold_scale(block.module.get_submodule(fold.before), readers, scale)
        group_size = block.target["group_size"]
        for names in block.shared_inputs():
            moments = _group_moments(block, names[0], group_size)
            for name in names:
                w = block.linears[name].weight.detach().float()
                if not any(part in name.rpartition(".")[2] for part in _NOT_CLIPPED):
                    w = self._clipped(w, moments, block.target)
                block.replace(name, round_to_nearest(w, **block.target, rule=self.rule))

    def search(self, block: Block, fold: Fold) -> Tensor | None:
        """The scale ``[K]`` of the grid that changes the block's output least, or None for none."""
        calls = block.calls[: self.samples]
        exact = block.outputs(calls)
        readers = [block.linears[name] for name in fold.linears]
        x = _mean_magnitude(block, fold.linears[0])
        w = _relative_magnitude(readers, block.target["group_size"])
        best, least = None, self._error(block, readers, torch.ones_like(x), exact)
        for i in range(self.steps):
            scale = scaling_of(x, w, i / self.steps)
            error = self._error(block, readers, scale, exact)
            if error < least:
                best, least = scale, error
        return best

    def _error(
        self, block: Block, readers: Sequence[nn.Linear], scale: Tensor, exact: list[Tensor]
    ) -> float:
        """Of the block's output, with only these layers rounded: ``W`` as ``Q(W s) / s``."""
        with restored(readers):
            for linear in readers:
                w = linear.weight.data.float() * scale
                q = dequantize(round_to_nearest(w, **block.target, rule=self.rule)) / scale
                linear.weight.data = q.to(linear.weight.dtype)
            outputs = block.outputs(block.calls[: len(exact)])
        pairs = zip(outputs, exact, strict=True)
        return sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)

    def _clipped(self, w: Tensor, moments: Tensor, target: dict[str, object]) -> Tensor:
        """Every group of a row clipped where that lowers the error ``Δ (XᵀX) Δᵀ`` of its share."""
        k, group_size = w.shape[1], moments.shape[-1]
        groups = nn.functional.pad(w, (0, -k % group_size)).unflatten(1, (-1, group_size))
        absmax = groups.abs().amax(-1, keepdim=True)
        best, least = groups, torch.full_like(absmax, torch.inf)
        for i in range(self.clips):
            tried = groups.clamp(-absmax * (1 - i / 20), absmax * (1 - i / 20))
            flat = tried.flatten(1)[:, :k]
            q = dequantize(round_to_nearest(flat, **target, rule=self.rule))  # type: ignore[arg-type]
            delta = nn.functional.pad(w - q, (0, -k % group_size)).unflatten(1, (-1, group_size))
            error = torch.einsum("ngi,gij,ngj->ng", delta, moments, delta)[..., None]
            best = torch.where(error < least, tried, best)
            least = torch.minimum(error, least)
        clipped: Tensor = best.flatten(1)[:, :k]
        return clipped


def scaling_of(x: Tensor, w: Tensor, r: float) -> Tensor:
    """``s = x^r / w^(1 - r)`` ``[K]`` over its geometric middle; 1 for channels never used.

    Args:
        x: ``[K]``, mean magnitude of every channel of the input.
        w: ``[K]``, that of the weights relative to their groups.
        r: in [0, 1].
    """
    used = (x > 0) & (w > 0)
    scale = (x**r / (w ** (1 - r) + 1e-4)).clamp(min=1e-4)[used]
    if not len(scale):
        return torch.ones_like(x)
    return torch.ones_like(x).masked_scatter(used, scale / (scale.max() * scale.min()).sqrt())


def _mean_magnitude(block: Block, name: str) -> Tensor:
    total, count = torch.zeros(block.linears[name].in_features), 0
    for x in block.inputs(name):
        total += x.abs().sum(0)
        count += len(x)
    return total / max(count, 1)


def _relative_magnitude(linears: Sequence[nn.Linear], group_size: int) -> Tensor:
    """Mean over all rows ``[K]`` of a weight's magnitude relative to its group's largest."""
    w = torch.cat([linear.weight.detach().float().abs() for linear in linears])
    k = w.shape[1]
    groups = nn.functional.pad(w, (0, -k % group_size)).unflatten(1, (-1, group_size))
    relative = groups / (groups.amax(-1, keepdim=True) + 1e-6)
    mean: Tensor = relative.flatten(1)[:, :k].mean(0)
    return mean


def _group_moments(block: Block, name: str, group_size: int) -> Tensor:
    """``XᵀX`` of every group of inputs ``[G, g, g]``."""
    k = block.linears[name].in_features
    total = torch.zeros(-(-k // group_size), group_size, group_size)
    for x in block.inputs(name):
        groups = nn.functional.pad(x, (0, -k % group_size)).unflatten(1, (-1, group_size))
        groups = groups.transpose(0, 1)
        total.baddbmm_(groups.transpose(1, 2), groups)
    return total
