"""What merging would lose, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastweights._tables import markdown_table
from fastweights.adapters.activate import check_names
from fastweights.adapters.base import dtype_of, row_tiles
from fastweights.adapters.lora_layer import LoRALayer
from fastweights.adapters.protocol import AdapterLayer
from fastweights.adapters.rounding import wide_dtype
from fastweights.adapters.rules import paths
from fastweights.ops.quantization.layers import QuantizedLinear

__all__ = ["MergeLoss", "MergeReport", "merge_report"]


@dataclass(frozen=True)
class MergeLoss:
    """A layer before and after its merge, Δ being what the adapters add to its weight W.

    Attributes:
        path: of the layer.
        format: what the merged weight is kept in.
        size: ‖Δ‖ / ‖W‖.
        predicted: what the dtype alone lets expect for `measured`; NaN over codes.
        measured: ‖rounded(W + Δ) - (W + Δ)‖ / ‖Δ‖.
        unmoved: the share of the entries that are the same after the merge.
    """

    path: str
    format: str
    size: float
    predicted: float
    measured: float
    unmoved: float


@dataclass(frozen=True)
class MergeReport:
    """The layers that have something to merge; printed as a table.

    Attributes:
        layers: in module order.
    """

    layers: tuple[MergeLoss, ...]

    def __iter__(self) -> Iterator[MergeLoss]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        heads = ("layer", "kept as", "size", "predicted", "measured", "unmoved")
        rows = []
        for loss in self.layers:
            shares = (loss.size, loss.predicted, loss.measured, loss.unmoved)
            rows.append((loss.path, loss.format, *(f"{100 * x:.2g}%" for x in shares)))
        return markdown_table(heads, rows)


@torch.no_grad()
def merge_report(
    model: nn.Module, names: str | Sequence[str] | None = None, *, dtype: torch.dtype | None = None
) -> MergeReport:
    """How much of the adapters `merge` would lose to rounding; nothing is changed.

    The merged weight W + Δ is rounded to the dtype of the weight. A number of a dtype with machine
    epsilon ε is wrong by ε / √12 of the power of two below it, which over a binade comes to
    √(ln 2 / 18) ε ≈ 0.2 ε of its size; so of Δ is lost about 0.2 ε ‖W‖ / ‖Δ‖: in bfloat16 a sixth
    of an update of a hundredth of the weight. Unmerged, or merged with ``dtype=torch.float32``,
    it is there.

    Args:
        model: with adapters of LoRA.
        names: what would be merged; None: the active ones.
        dtype: what the weights would become; None: what they are.

    Raises:
        ValueError: a name that the model does not have, merged layers, or nothing to merge.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import LoRA, merge_report
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16))
        >>> (loss,) = merge_report(fw.adapt(model, LoRA(init="random")))
        >>> loss.path, loss.format, 0.5 < loss.predicted / loss.measured < 2
        ('0', 'bfloat16', True)
    """
    chosen = None if names is None else ((names,) if isinstance(names, str) else tuple(names))
    if chosen is not None:
        check_names("merge_report", model, chosen)
    layers = [(path, layer) for path, layer in paths(model) if isinstance(layer, AdapterLayer)]
    losses = []
    for path, layer in layers:
        if layer.merged:
            raise ValueError(f"merge_report: expected {path} to be unmerged first")
        here = [n for n in (layer.active if chosen is None else chosen) if n in layer.configs]
        if here and isinstance(layer, LoRALayer):
            losses.append(_loss(path, layer, tuple(here), dtype))
    if not losses:
        raise ValueError("merge_report: expected a model with LoRA to merge, got none")
    return MergeReport(tuple(losses))


def _loss(
    path: str, layer: LoRALayer, names: tuple[str, ...], dtype: torch.dtype | None
) -> MergeLoss:
    merged, base = layer.merged_layer(names, dtype, "nearest"), layer.base_layer
    kept, codes = dtype or dtype_of(base), isinstance(merged, QuantizedLinear)
    wide = wide_dtype(dtype_of(base))
    squares, entries, unmoved = [0.0, 0.0, 0.0], 0, 0
    for (part, w), (_, after) in zip(row_tiles(base, wide), row_tiles(merged, wide), strict=True):
        exact, w = layer.merged_rows(w, part, names), layer.original_rows(w, part)
        for i, t in enumerate((w, exact - w, after - exact)):
            squares[i] += float(t.double().square().sum())
        unmoved += int((after == w).sum())
        entries += w.numel()
    weight, delta, error = (math.sqrt(s) for s in squares)
    expected = math.sqrt(math.log(2) / 18) * torch.finfo(kept).eps
    return MergeLoss(
        path,
        merged.format if isinstance(merged, QuantizedLinear) else str(kept).removeprefix("torch."),
        delta / weight if weight else math.inf,
        math.nan if codes else (expected * weight / delta if delta else math.inf),
        error / delta if delta else math.nan,
        unmoved / entries,
    )
