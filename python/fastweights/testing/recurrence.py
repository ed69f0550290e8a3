"""Generic tests of recurrences: a call split in two, and a prefix continued token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastweights.testing.compare import assert_close
from fastweights.testing.opspec import OpSpec, Sample

__all__ = ["continues_by_steps", "resumes_anywhere"]


def _sequences(spec: OpSpec) -> Iterator[dict[str, Any]]:
    """Arguments by name of the float32 samples that are one forward sequence of two tokens up."""
    for call in spec.samples(torch.float32):
        bound = spec.bind(call) | {"output_final_state": True}
        packed = bound.get("reverse", False) or any(
            bound.get(name) is not None for name in ("cu_seqlens", "seq_idx")
        )
        tokens = bound[spec.time[0]]
        if not packed and tokens.numel() and tokens.shape[1] > 1:
            yield bound


def _between(spec: OpSpec, bound: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    def cut(name: str, value: Any) -> Any:
        timed = name in spec.time and isinstance(value, Tensor) and value.dim() > 2
        return value[:, start:stop] if timed else value

    return {name: cut(name, value) for name, value in bound.items()}


def _token(spec: OpSpec, bound: dict[str, Any], t: int, known: set[str]) -> dict[str, Any]:
    """What `step` takes of the arguments, at token t."""
    cut = _between(spec, bound, t, t + 1)

    def at(name: str, value: Any) -> Any:
        timed = name in spec.time and isinstance(value, Tensor) and value.dim() > 2
        return value[:, 0] if timed else value

    return {name: at(name, value) for name, value in cut.items() if name in known}


def _agree(spec: OpSpec, bound: dict[str, Any], got: Any, expected: Any, what: str) -> None:
    tolerance = spec.tolerances[torch.float32].output
    try:
        assert_close(got, expected, tolerance=tolerance, what="(o, final_state)")
    except AssertionError as problem:
        raise AssertionError(f"{spec.name}{Sample((), bound)} [{what}]\n{problem}") from problem


def _split_points(length: int) -> list[int]:
    return sorted({1, length // 3 or 1, (length + 1) // 2, length - 1})


def resumes_anywhere(spec: OpSpec) -> None:
    """Running [0, t) and then [t, T) from its final state equals running [0, T)."""
    for bound in _sequences(spec):
        length = bound[spec.time[0]].shape[1]
        expected = spec.function(**bound)
        for t in _split_points(length):
            first, state = spec.function(**_between(spec, bound, 0, t))
            rest = _between(spec, bound, t, length) | {"initial_state": state}
            second, final = spec.function(**rest)
            got = (torch.cat([first, second], 1), final)
            _agree(spec, bound, got, expected, f"split at {t} of {length}")


def continues_by_steps(spec: OpSpec) -> None:
    """`step` from the state of a prefix gives the same outputs and the same final state."""
    assert spec.step is not None
    known = set(inspect.signature(spec.step).parameters)
    for bound in _sequences(spec):
        set_to = {name for name, value in bound.items() if value is not None and value is not False}
        if not set_to <= known | {"initial_state", "output_final_state"}:
            continue
        length = bound[spec.time[0]].shape[1]
        t = max(1, length - 3)
        first, state = spec.function(**_between(spec, bound, 0, t))
        outputs = [first]
        for i in range(t, length):
            outputs.append(spec.step(**_token(spec, bound, i, known), state=state).unsqueeze(1))
        got = (torch.cat(outputs, 1), state)
        _agree(spec, bound, got, spec.function(**bound), f"steps from {t} of {length}")
