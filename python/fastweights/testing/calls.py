"""Running one sample of a spec, and recording the ops underneath."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastweights.testing.opspec import OpSpec, Sample

__all__ = [
    "Outcome",
    "RawCall",
    "distinct_raw_calls",
    "leaves_of",
    "poisoned_memory",
    "raw_calls",
    "run",
]


class Outcome(NamedTuple):
    """What a call leaves behind; gradients by parameter name, zeros where there is none."""

    outputs: Any
    mutated: dict[str, Any]
    gradients: dict[str, list[Tensor]]


class RawCall(NamedTuple):
    """One call that reached `torch.ops.fastweights`, with copies of its arguments."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def leaves_of(spec: OpSpec, call: Sample) -> dict[str, list[Tensor]]:
    """The floating tensors of the differentiable parameters that the call passes."""
    bound = spec.bind(call)
    return {
        name: [
            leaf
            for leaf in pytree.tree_leaves(bound[name])
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        for name in spec.differentiable
        if bound.get(name) is not None
    }


def cotangent(like: Tensor, index: int) -> Tensor:
    """Random multiples of 1/8 in [-1, 1]: the same numbers in every floating dtype."""
    generator = torch.Generator().manual_seed(index)
    eighths = torch.randint(-8, 9, like.shape, generator=generator)
    return (eighths.double() / 8).to(like.dtype)


def run(
    spec: OpSpec, function: Callable[..., Any], call: Sample, *, gradients: bool = True
) -> Outcome:
    """Call `function`, then differentiate a fixed linear functional of its outputs.

    The call's tensors are not changed: those that the op mutates are copied first.
    """
    changed = {id(t) for name in spec.mutates for t in pytree.tree_leaves(spec.bind(call)[name])}
    call = call.map_tensors(lambda t: t.clone() if id(t) in changed else t.detach())
    leaves = leaves_of(spec, call) if gradients else {}
    for tensors in leaves.values():
        for leaf in tensors:
            leaf.requires_grad_()
    outputs = function(*call.args, **call.kwargs)
    ends = [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.requires_grad]
    starts = [leaf for tensors in leaves.values() for leaf in tensors]
    found: tuple[Tensor | None, ...] = (None,) * len(starts)
    if starts and ends:
        weights = [cotangent(o, i) for i, o in enumerate(ends)]
        found = torch.autograd.grad(ends, starts, weights, allow_unused=True)
    grads = (torch.zeros_like(s) if g is None else g for s, g in zip(starts, found, strict=True))
    return Outcome(
        pytree.tree_map_only(Tensor, torch.Tensor.detach, outputs),
        {name: spec.bind(call)[name] for name in spec.mutates},
        {name: [next(grads) for _ in tensors] for name, tensors in leaves.items()},
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch allocates without initialising with NaN, so that unwritten outputs show."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RawCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastweights":
            copies = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
            self.calls.append(RawCall(func, *copies))
        return func(*args, **kwargs)


def raw_calls(spec: OpSpec, call: Sample) -> list[RawCall]:
    """The calls of `torch.ops.fastweights` that the sample makes, forward and backward."""
    recorder = _Recorder()
    with recorder:
        run(spec, spec.function, call)
    return recorder.calls


def distinct_raw_calls(spec: OpSpec, limit: int) -> list[RawCall]:
    """Calls that differ in op or in which arguments are there; at most `limit` per op."""
    kept: dict[Any, RawCall] = {}
    for call in spec.samples(spec.first_dtype):
        for raw in raw_calls(spec, call):
            flat = pytree.tree_leaves((raw.args, raw.kwargs))
            pattern = tuple(a if isinstance(a, (bool, str)) else type(a) for a in flat)
            if sum(key[0] == raw.op for key in kept) < limit:
                kept.setdefault((raw.op, pattern), raw)
    assert kept, f"{spec.name}: no sample reaches torch.ops.fastweights"
    return list(kept.values())
