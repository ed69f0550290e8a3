"""Moving scales between a layer and what feeds it, without changing what a block computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.quantization.walk import Block, hooked, tensors_of

__all__ = ["Fold", "find_folds", "fold_scale", "restored"]

# Exponents of the scales that a fold is tried with; exact, so that a legal fold keeps every bit.
_TRIED = (-4, 5)


@dataclass(frozen=True)
class Fold:
    """Linear layers of a block that share their input, and the module whose parameters scale it.

    Args:
        before: name of a norm, or of a linear layer.
        linears: names of all that reads its output.
    """

    before: str
    linears: tuple[str, ...]


def fold_scale(before: nn.Module, linears: Sequence[nn.Module], scale: Tensor) -> None:
    """Divides what a module gives by a scale, and multiplies the weights of its readers by it.

    ``y = (x / s) (W diag(s))^T``: the identity before rounding, and after it columns of W with a
    large s are the ones that are kept well (SmoothQuant, 2022; AWQ, 2023). Parameters get new
    tensors, computed in float32.

    Args:
        before: a norm with a weight ``[K]``, or a linear layer with one of ``[K, ...]``, and
            perhaps a bias ``[K]``.
        linears: layers with weights ``[N, K]``.
        scale: float32 ``[K]``, positive.

    Example:
        >>> import torch
        >>> from fastweights.quantization.scaling import fold_scale
        >>> norm, linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)
        >>> x, s = torch.randn(2, 8), torch.rand(8) + 0.5
        >>> y = linear(norm(x))
        >>> fold_scale(norm, [linear], s)
        >>> torch.testing.assert_close(linear(norm(x)), y)
    """
    for part in (before.weight, getattr(before, "bias", None)):
        if isinstance(part, Tensor):
            rows = scale.view(-1, *[1] * (part.dim() - 1))
            part.data = (part.data.float() / rows).to(part.dtype)
    for linear in linears:
        weight = linear.weight
        assert isinstance(weight, Tensor)
        weight.data = (weight.data.float() * scale).to(weight.dtype)


def find_folds(block: Block) -> list[Fold]:
    """All pairs of a module and its readers in a block that a scale can be moved between.

    Nothing is known of the block but what it does: a candidate is a module with one parameter per
    channel that ran before, and it is one if moving a scale of random powers of two leaves every
    bit of the block's output. That finds norms, the rows of a value projection behind as many heads
    as queries have, an up projection behind its gate or a ReLU; it refuses norms whose output
    something else reads. Parameters that other blocks share are left alone.
    """
    groups = block.shared_inputs()
    ran = _order(block)
    exact = _leaves(block)
    folds = []
    for names in groups:
        readers = [block.module.get_submodule(name) for name in names]
        width = block.linears[names[0]].in_features
        scale = _powers_of_two(width)
        earlier = ran[: ran.index(names[0])] if names[0] in ran else []
        for name in reversed(earlier):
            before = block.module.get_submodule(name)
            changed = [before, *readers]
            tied = any(p in block.tied for m in changed for p in m.parameters())
            if name in names or tied or not _scalable(before, width):
                continue
            with restored(changed):
                fold_scale(before, readers, scale)
                same = all(torch.equal(a, b) for a, b in zip(_leaves(block), exact, strict=True))
            if same:
                folds.append(Fold(name, tuple(names)))
                break
    return folds


@contextmanager
def restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Gives the modules' parameters, at the end, the tensors that they had."""
    data = {p: p.data for module in modules for p in module.parameters()}
    try:
        yield
    finally:
        for parameter, values in data.items():
            parameter.data = values


def _scalable(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape[0] != width:
        return False
    return type(module) is nn.Linear or weight.dim() == 1


def _powers_of_two(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(*_TRIED, (width,), generator=generator).float().exp2()


def _leaves(block: Block) -> list[Tensor]:
    return tensors_of(block.calls[0].run(block.module))


def _order(block: Block) -> list[str]:
    """Modules without children in the order in which they run first."""
    order: list[str] = []

    def hook(name: str) -> Any:
        def note(*_: Any) -> None:
            if name not in order:
                order.append(name)

        return note

    leaves = {m: hook(n) for n, m in block.module.named_modules() if n and not any(m.children())}
    with hooked(leaves):
        block.calls[0].run(block.module)
    return order
