"""The generic tests of what an op refuses, and how."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils import _pytree as pytree

from fastweights.testing.calls import distinct_raw_calls, leaves_of
from fastweights.testing.opspec import OpSpec, Sample

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFUSALS = (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError)


def raises_on_bad_input(spec: OpSpec) -> None:
    """Each bad input raises what the spec says; dtypes without a tolerance raise too."""
    for bad in spec.bad_inputs:
        source = inspect.getsource(bad.call).strip()
        try:
            bad.call()
        except Exception as raised:
            assert isinstance(raised, bad.exception), f"{source}: raised {raised!r}"
            found = re.search(bad.message, str(raised))
            assert found, f"{source}: expected a message like {bad.message!r}, got {raised}"
            continue
        raise AssertionError(f"{spec.name}: expected {bad.exception.__name__} from {source}")
    call = spec.samples(spec.first_dtype)[0]
    for dtype in {*FLOATING, torch.int32} - set(spec.tolerances):
        wrong = call.to(dtype)
        try:
            spec.function(*wrong.args, **wrong.kwargs)
        except (RuntimeError, TypeError, ValueError):
            continue
        raise AssertionError(f"{spec.name}: accepted {dtype}, which the spec does not support")


def _nonsense(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        shorter = [value.narrow(d, 0, n - 1) for d, n in enumerate(value.shape) if n > 0]
        longer = [torch.cat([value, value], d) for d in range(value.dim())]
        others = [value.unsqueeze(0), value.new_empty(0), value.new_zeros(()), value.to("meta")]
        kinds = [value.to(torch.int64), value.to(torch.bool), value.to(torch.complex64)]
        numbers = [] if value.is_floating_point() else [-value - 1, value + 2**30]
        return shorter + longer + others + kinds + numbers
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [-1, 0, 1, 2**31, 2**62]
    if isinstance(value, float):
        return [math.nan, math.inf, -1.0]
    if isinstance(value, str):
        return ["", "nonsense"]
    if isinstance(value, (list, tuple)):
        return [[], list(value) + list(value)] + [
            [*value[:i], wrong, *value[i + 1 :]]
            for i, item in enumerate(value)
            for wrong in _nonsense(item)
        ]
    return [torch.zeros(3), torch.zeros(0, dtype=torch.int64)]


def survives_nonsense(spec: OpSpec) -> None:
    """Wrong arguments given to `torch.ops.fastweights` raise or are served; they never crash."""
    for raw in distinct_raw_calls(spec, limit=3):
        named = {f"keyword {name}": name for name in raw.kwargs}
        for position in [*range(len(raw.args)), *named.values()]:
            old = raw.args[position] if isinstance(position, int) else raw.kwargs[position]
            for wrong in _nonsense(old):
                args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (raw.args, raw.kwargs))
                if isinstance(position, int):
                    args = (*args[:position], wrong, *args[position + 1 :])
                else:
                    kwargs = kwargs | {position: wrong}
                try:
                    raw.op(*args, **kwargs)
                except REFUSALS:
                    continue


def has_the_signature_of_its_reference(spec: OpSpec) -> None:
    """Same parameters, order and defaults, but for private parameters of the function."""

    def public(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if not p.name.startswith("_")]

    ours, reference = public(spec.function), public(spec.reference)
    assert ours == reference, f"{spec.name}: expected {reference}, got {ours}"


def _expect(message: str, action: Callable[[], object]) -> None:
    try:
        action()
    except RuntimeError as raised:
        assert re.search(message, str(raised)), f"expected a message like {message!r}: {raised}"
        return
    raise AssertionError(f"expected RuntimeError with {message!r}")


def _with_leaves(spec: OpSpec, call: Sample) -> tuple[Sample, list[Tensor]]:
    fresh = call.map_tensors(lambda t: t.detach().clone())
    leaves = [leaf for group in leaves_of(spec, fresh).values() for leaf in group]
    return fresh, [leaf.requires_grad_() for leaf in leaves]


def refuses_unsupported_derivatives(spec: OpSpec) -> None:
    """Double backward, forward mode and gradients through a mutated argument raise."""
    call = next(c for c in spec.samples(spec.first_dtype) if all(t.numel() for t in c.tensors()))
    if spec.mutates:
        fresh = call.map_tensors(lambda t: t.clone().requires_grad_(t.is_floating_point()))
        _expect(spec.name, lambda: spec.function(*fresh.args, **fresh.kwargs))
    if not spec.differentiable:
        return
    fresh, leaves = _with_leaves(spec, call)
    outputs = pytree.tree_leaves(spec.function(*fresh.args, **fresh.kwargs))
    ends = [o.square().sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad]
    grads = torch.autograd.grad(ends, leaves, create_graph=True, allow_unused=True)
    total = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
    _expect(f"fastweights.reference.{spec.name}", total.backward)

    with forward_ad.dual_level():
        fresh, leaves = _with_leaves(spec, call)
        first = leaves[0].detach()
        dual = forward_ad.make_dual(first, torch.ones_like(first))
        given = fresh.map_tensors(lambda t: dual if t is leaves[0] else t.detach())
        _expect(spec.name, lambda: spec.function(*given.args, **given.kwargs))
