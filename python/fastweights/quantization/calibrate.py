"""Solvers and their run over a model: progress, interruption, checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastweights.quantization.checkpoint import Checkpoint
from fastweights.quantization.samples import Sample
from fastweights.quantization.walk import Block, Walk, set_module

__all__ = ["Solver", "calibrate_"]


class Solver(ABC):
    """How the linear layers of a block become quantized ones.

    Solvers are frozen dataclasses, so that their `repr` tells one setting from another.
    """

    calibrated: ClassVar[bool] = True
    """Whether it looks at inputs."""

    @property
    def compares(self) -> bool:
        """Whether it also looks at the inputs that the float model gives."""
        return False

    def prepare(self, walk: Walk) -> dict[str, Tensor]:
        """What has to be known of the whole model before its first block is solved."""
        return {}

    @abstractmethod
    def solve(self, block: Block, prepared: Mapping[str, Tensor]) -> None:
        """Replaces every layer of ``block.linears``; parameters change by new tensors only."""


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    linears: Sequence[str],
    solver: Solver,
    samples: list[Sample],
    target: dict[str, Any],
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> None:
    """Lets a solver quantize linear layers of a model in place; see `fastweights.quantize_`.

    Args:
        model: any module.
        linears: names of `nn.Linear` modules in it.
        solver: what does it.
        samples: from `read_samples`.
        target: format, group size and activation.
        checkpoint: a folder to resume from and to write.
        progress: show a bar.
    """
    training = {name for name, module in model.named_modules() if module.training}
    model.eval()
    try:
        walk = Walk(model, linears, samples if solver.calibrated else [], target, solver.compares)
        kept = None if checkpoint is None else Checkpoint(Path(checkpoint), solver, samples, target)
        prepared = None if kept is None else kept.prepared()
        if prepared is None:
            prepared = solver.prepare(walk)
            if kept is not None:
                kept.keep_prepared(prepared)
        for block in _with_bar(walk, type(solver).__name__, progress):
            with _whole_or_untouched(block.module):
                if kept is None or not kept.restore(block):
                    solver.solve(block, prepared)
                    if kept is not None:
                        kept.keep(block)
    finally:
        for name, module in model.named_modules():
            module.training = name in training


def _with_bar(walk: Walk, name: str, progress: bool) -> Iterator[Block]:
    if not progress:
        yield from walk.blocks()
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield from walk.blocks()
        return
    with tqdm(walk.blocks(), desc=name, unit="block", total=len(walk.names)) as bar:
        for block in bar:
            bar.set_postfix_str(block.name)
            yield block


@contextmanager
def _whole_or_untouched(module: nn.Module) -> Iterator[None]:
    """Undoes what was done to a block's modules and parameters when it is not finished."""
    modules = dict(module.named_modules(remove_duplicate=False))
    data = {p: p.data for p in module.parameters()}
    try:
        yield
    except BaseException:
        for name, child in modules.items():
            if name:
                set_module(module, name, child)
        for parameter, values in data.items():
            parameter.data = values
        raise
