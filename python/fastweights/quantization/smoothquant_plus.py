"""SmoothQuant+: outliers of activations moved into the weights, as far as the whole model likes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.quantization.calibrate import Solver
from fastweights.quantization.round_to_nearest import check_rule, round_to_nearest
from fastweights.quantization.samples import Sample
from fastweights.quantization.scaling import Fold, find_folds, fold_scale
from fastweights.quantization.walk import Block, Walk, set_module, tensors_of

__all__ = ["SmoothQuantPlus", "smoothing_scale"]

Loss = Callable[[nn.Module, Sample], Tensor]


@dataclass(frozen=True)
class SmoothQuantPlus(Solver):
    """SmoothQuant+ (2023): ``s = max|X|^α / max|W|^(1 - α)`` per channel, then nearest rounding.

    Layers that share an input are multiplied by s, what feeds them divided by it. One α serves the
    whole model: that of a grid, or no smoothing at all, with the least loss of the rounded model on
    the calibration. The grid costs a pass and a rounding each.

    Args:
        alphas: the grid. One value is taken without a search.
        samples: of the calibration that the losses are taken on.
        loss: ``loss(model, sample)``, a scalar; ``sample.run(model, all_logits=True)`` is the
            model's output. None: where every token has logits over all tokens the cross-entropy of
            the next one, else the squared difference to the output of the float model.
        rule: of the grid of levels, see `round_to_nearest`.

    Raises:
        ValueError: values out of range.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.quantization import SmoothQuantPlus
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
        >>> x, solver = torch.randn(8, 16, 64), SmoothQuantPlus(alphas=(0.5,))
        >>> model = fw.quantize_(model, "int4", solver=solver, calibration=x, progress=False)
    """

    alphas: tuple[float, ...] = tuple(i / 20 for i in range(21))
    samples: int = 4
    loss: Loss | None = None
    rule: str = "search"

    def __post_init__(self) -> None:
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"SmoothQuantPlus: expected alphas in [0, 1], got {self.alphas}")
        if self.samples < 1:
            raise ValueError(f"SmoothQuantPlus: expected samples >= 1, got {self.samples}")
        check_rule("SmoothQuantPlus", self.rule)

    def prepare(self, walk: Walk) -> dict[str, Tensor]:
        """Largest magnitudes of every channel, what can be folded, and α (NaN for none)."""
        maxima: dict[str, Tensor] = {}
        blocks: dict[str, Block] = {}
        for block in walk.blocks():
            for fold in find_folds(block):
                maxima[_key(block, fold)] = _largest(block, fold.linears[0])
            blocks[block.name] = replace(block, calls=[])
        if len(self.alphas) == 1:
            return {**maxima, "alpha": torch.tensor(self.alphas[0], dtype=torch.float64)}
        samples = walk.samples[: self.samples]
        loss = self.loss or _default_loss(walk.model, samples)
        best, least = torch.nan, torch.inf
        for alpha in (torch.nan, *self.alphas):
            found = self._trial(walk.model, blocks, maxima, alpha, samples, loss)
            if found < least:
                best, least = alpha, found
        return {**maxima, "alpha": torch.tensor(best, dtype=torch.float64)}

    def solve(self, block: Block, prepared: Mapping[str, Tensor]) -> None:
        """Smooths and rounds a block."""
        alpha = float(prepared["alpha"])
        if alpha == alpha:
            for key in sorted(prepared):  # a checkpoint keeps no order
                largest = prepared[key]
                if (fold := _fold(block, key)) is not None:
                    readers = [block.linears[name] for name in fold.linears]
                    scale = smoothing_scale(largest, [r.weight for r in readers], alpha)
                    fold_scale(block.module.get_submodule(fold.before), readers, scale)
        for name, linear in block.linears.items():
            block.replace(name, round_to_nearest(linear.weight, **block.target, rule=self.rule))

    def _trial(
        self, model: nn.Module, blocks: dict[str, Block], maxima: dict[str, Tensor], alpha: float,
        samples: Sequence[Sample], loss: Loss,
    ) -> float:  # fmt: skip
        """The loss with an α; the model holds rounded copies of its blocks for that long."""
        prepared = {**maxima, "alpha": torch.tensor(alpha, dtype=torch.float64)}
        try:
            for name, block in blocks.items():
                module = copy.deepcopy(block.module)
                linears: dict[str, Any] = {n: module.get_submodule(n) for n in block.linears}
                trial = replace(block, module=module, linears=linears)
                self.solve(trial, prepared)
                set_module(model, name, trial.module)
            return sum(float(loss(model, sample)) for sample in samples)
        finally:
            for name, block in blocks.items():
                set_module(model, name, block.module)


def smoothing_scale(largest: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """``s = max|X|^α / max|W|^(1 - α)`` ``[K]``, at least 1e-5; 1 for channels that are never used.

    Args:
        largest: ``[K]``, largest magnitude of every channel of the input.
        weights: ``[N, K]`` of all layers that share the input.
        alpha: in [0, 1]: 0 makes the weights' columns equally large, 1 the activations' channels.
    """
    w = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    scale = (largest**alpha / w ** (1 - alpha)).clamp(min=1e-5)
    return torch.where((largest == 0) | (w == 0), 1.0, scale)


def _largest(block: Block, name: str) -> Tensor:
    """Largest magnitude ``[K]`` of every channel of a layer's input."""
    result = torch.zeros(block.linears[name].in_features)
    for x in block.inputs(name):
        if len(x):
            result = torch.maximum(result, x.abs().amax(0))
    return result


def _key(block: Block, fold: Fold) -> str:
    return "/".join([block.name, fold.before, *fold.linears])


def _fold(block: Block, key: str) -> Fold | None:
    name, _, rest = key.partition("/")
    if name != block.name:
        return None
    before, *linears = rest.split("/")
    return Fold(before, tuple(linears))


def _default_loss(model: nn.Module, samples: Sequence[Sample]) -> Loss:
    """Next-token cross-entropy of a language model, or the change of another one's output."""
    outputs = (sample.run(model, all_logits=True) for sample in samples)
    if all(_are_predicted(_tokens(s), output) for s, output in zip(samples, outputs, strict=True)):

        def cross_entropy(model: nn.Module, sample: Sample) -> Tensor:
            target: Any = _tokens(sample)
            logits = sample.run(model, all_logits=True).logits[:, :-1]
            return F.cross_entropy(logits.flatten(0, 1).float(), target[:, 1:].flatten())

        return cross_entropy
    exact = {id(sample): tensors_of(sample.run(model))[0] for sample in samples}
    return lambda model, sample: F.mse_loss(
        tensors_of(sample.run(model))[0].float(), exact[id(sample)].float()
    )


def _are_predicted(tokens: Tensor | None, output: Any) -> bool:
    """Whether the output has logits of every token, as no classifier has."""
    logits = getattr(output, "logits", None)
    if tokens is None or not isinstance(logits, Tensor) or logits.shape[:-1] != tokens.shape:
        return False
    return tokens.numel() > 0 and logits.shape[-1] > int(tokens.max())


def _tokens(sample: Sample) -> Tensor | None:
    """The integer tokens ``[B, T]`` that a language model is given."""
    found = sample.options.get("input_ids", sample.args[0] if sample.args else None)
    return found if isinstance(found, Tensor) and found.dtype == torch.int64 else None
