"""The generic tests of what an op computes.

Each takes a spec and raises AssertionError with the call that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastweights.testing.calls import (
    Outcome,
    distinct_raw_calls,
    leaves_of,
    poisoned_memory,
    run,
)
from fastweights.testing.compare import assert_close, assert_equal
from fastweights.testing.levels import available_cpu_levels, cpu_level
from fastweights.testing.opspec import OpSpec, Sample


@contextmanager
def _naming(spec: OpSpec, call: Sample, *where: object) -> Iterator[None]:
    """Put the call in front of whatever goes wrong inside."""
    try:
        yield
    except Exception as problem:
        place = ", ".join(str(w) for w in where if w)
        raise AssertionError(f"{spec.name}{call} [{place}]\n{problem}") from problem


def _variants(spec: OpSpec) -> dict[str, dict[str, Any]]:
    return {"": {}} | {name: dict(extra) for name, extra in spec.forms.items()}


def _same(got: Outcome, expected: Outcome) -> None:
    assert_equal(got.outputs, expected.outputs, what="output")
    assert_equal(got.mutated, expected.mutated, what="mutated")
    assert_equal(got.gradients, expected.gradients, what="gradient")


def matches_reference(spec: OpSpec, dtype: torch.dtype) -> None:
    """Values, dtypes, mutated arguments and gradients, at every CPU level and for every form."""
    tolerance = spec.tolerances[dtype]
    for number, call in enumerate(spec.samples(dtype)):
        expected = run(spec, spec.reference, call.to(spec.oracle_dtype))
        plain = run(spec, spec.reference, call, gradients=False) if number == 0 else None
        for level in available_cpu_levels():
            for form, extra in _variants(spec).items():
                forced = Sample(call.args, call.kwargs | extra)
                with _naming(spec, call, dtype, level, form), cpu_level(level), poisoned_memory():
                    got = run(spec, spec.function, forced)
                    assert_close(
                        got.outputs, expected.outputs, tolerance=tolerance.output, what="output"
                    )
                    assert_close(
                        got.mutated, expected.mutated, tolerance=tolerance.output, what="mutated"
                    )
                    for name, gradient in expected.gradients.items():
                        assert_close(
                            got.gradients[name],
                            gradient,
                            tolerance=tolerance.gradient,
                            what=f"gradient of {name}",
                        )
                    if plain is not None:
                        kinds = [getattr(t, "dtype", t) for t in pytree.tree_leaves(plain.outputs)]
                        ours = [getattr(t, "dtype", t) for t in pytree.tree_leaves(got.outputs)]
                        assert ours == kinds, f"expected output dtypes {kinds}, got {ours}"


def _of_leaves(
    spec: OpSpec, call: Sample, leaves: list[Tensor], extra: dict[str, Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """The call as a function of its differentiable tensors."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        values_of = dict(zip(map(id, leaves), values, strict=True))
        given = call.map_tensors(lambda t: values_of.get(id(t), t))
        outputs = pytree.tree_leaves(spec.function(*given.args, **given.kwargs, **extra))
        return tuple(o for o in outputs if isinstance(o, Tensor) and o.requires_grad)

    return function


def gradcheck(spec: OpSpec) -> None:
    """Numerical against analytical gradients in float64, for every form."""
    for call in spec.gradcheck():
        leaves = [leaf for group in leaves_of(spec, call).values() for leaf in group]
        for form, extra in _variants(spec).items():
            with _naming(spec, call, "gradcheck", form):
                function = _of_leaves(spec, call, leaves, extra)
                inputs = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
                assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def opcheck(spec: OpSpec) -> None:
    """torch.library.opcheck of every op underneath, forward and backward."""
    for raw in distinct_raw_calls(spec, limit=2):
        differentiable = "backward" not in raw.op.name() and not raw.op._schema.is_mutable
        names = [argument.name for argument in raw.op._schema.arguments]
        for name, value in (dict(zip(names, raw.args, strict=False)) | raw.kwargs).items():
            if differentiable and name in spec.differentiable and isinstance(value, Tensor):
                value.requires_grad_()
        with _naming(spec, Sample(raw.args, raw.kwargs), "opcheck", raw.op.name()):
            torch.library.opcheck(raw.op, raw.args, raw.kwargs)


def _strided(kind: str, t: Tensor) -> Tensor:
    if kind == "last dimension strided":
        return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]
    if kind == "rows padded" and t.dim():
        return torch.cat([t, torch.full_like(t[..., :1], 7)], -1)[..., :-1]
    if kind == "heads outermost" and t.dim() > 2:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t


def _restrided(spec: OpSpec, call: Sample, kind: str) -> Sample:
    """Other strides for every argument but those changed in place, which may refuse them."""
    fixed = {id(t) for n in spec.mutates for t in pytree.tree_leaves(spec.bind(call)[n])}
    return call.map_tensors(lambda t: t if id(t) in fixed else _strided(kind, t))


def reads_any_strides(spec: OpSpec) -> None:
    """Strided copies of the arguments give the same bits, or sums within tolerance."""
    tolerance = spec.tolerances[spec.first_dtype]
    for call in spec.samples(spec.first_dtype):
        expected = run(spec, spec.function, call)
        for kind in ("last dimension strided", "rows padded", "heads outermost"):
            with _naming(spec, call, kind):
                got = run(spec, spec.function, _restrided(spec, call, kind))
                for part in spec.sums_by_order:
                    assert_close(
                        getattr(got, part),
                        getattr(expected, part),
                        tolerance=tolerance.output if part == "outputs" else tolerance.gradient,
                        what=part,
                    )
                    got = got._replace(**{part: getattr(expected, part)})
                _same(got, expected)


def ignores_thread_count(spec: OpSpec) -> None:
    """1, 2 and 3 threads give the same bits."""
    before = torch.get_num_threads()
    try:
        for call in spec.samples(spec.first_dtype):
            outcomes = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                outcomes.append(run(spec, spec.function, call))
            with _naming(spec, call, "threads"):
                _same(outcomes[1], outcomes[0])
                _same(outcomes[2], outcomes[0])
    finally:
        torch.set_num_threads(before)


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def compiles(spec: OpSpec) -> None:
    """torch.compile(fullgraph=True, dynamic=True) and torch.export give the eager result."""
    call = next(c for c in spec.samples(spec.first_dtype) if all(t.numel() for t in c.tensors()))
    expected = run(spec, spec.function, call)
    torch._dynamo.reset()
    compiled = torch.compile(spec.function, fullgraph=True, dynamic=True, backend="aot_eager")
    with _naming(spec, call, "torch.compile"):
        _same(run(spec, compiled, call), expected)
    if not spec.exports:
        return
    fresh = call.map_tensors(torch.clone)
    exported = torch.export.export(_Module(spec.function), fresh.args, fresh.kwargs)
    with _naming(spec, call, "torch.export"):
        got = run(spec, exported.module(), call, gradients=False)
        assert_equal(got.outputs, expected.outputs)
        assert_equal(got.mutated, expected.mutated)
    torch._dynamo.reset()
