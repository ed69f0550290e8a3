"""Comparison of tensors with an error that says how far off, by which measure and where."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["assert_close", "assert_equal", "error"]


def error(got: Tensor, expected: Tensor) -> float:
    """Largest `|got - expected| / (|expected| + rms(expected))`, in float64.

    The rms term keeps rounding of large terms that cancel to a small element from counting as a
    large relative error. 0 for empty tensors; infinite where one of the two is NaN or an infinity
    and the other is not the same.
    """
    return _worst(got, expected)[0]


def _worst(got: Tensor, expected: Tensor) -> tuple[float, int, float]:
    a, b = got.detach().double().flatten(), expected.detach().double().flatten()
    if a.numel() == 0:
        return 0.0, 0, 0.0
    finite = torch.isfinite(b)
    rms = float(b[finite].square().mean().sqrt()) if bool(finite.any()) else 0.0
    difference = (a - b).abs()
    scaled = torch.where(difference == 0, 0.0, difference / (b.abs() + rms))
    same = (a == b) | (a.isnan() & b.isnan())
    scaled = torch.where(same, 0.0, torch.where(torch.isfinite(difference), scaled, torch.inf))
    index = int(scaled.argmax())
    return float(scaled[index]), index, rms


def _pairs(got: Any, expected: Any, what: str) -> list[tuple[str, Any, Any]]:
    a, structure = pytree.tree_flatten(got)
    b, other = pytree.tree_flatten(expected)
    if len(a) != len(b):
        raise AssertionError(f"{what}: expected {other}, got {structure}")
    return [
        (what if len(a) == 1 else f"{what}[{i}]", *ab)
        for i, ab in enumerate(zip(a, b, strict=True))
    ]


def assert_close(got: Any, expected: Any, *, tolerance: float, what: str = "result") -> None:
    """Raise AssertionError unless the two agree within `tolerance` (see `error`).

    Args:
        got: a tensor, or a tuple, list or dict of tensors and other values.
        expected: the same structure. Dtypes may differ, shapes may not.
        tolerance: bound on `error` for every tensor.
        what: name in the message.
    """
    for name, a, b in _pairs(got, expected, what):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or a != b:
                raise AssertionError(f"{name}: expected {b!r}, got {a!r}")
            continue
        if a.shape != b.shape:
            raise AssertionError(f"{name}: expected shape {list(b.shape)}, got {list(a.shape)}")
        worst, index, rms = _worst(a, b)
        if worst > tolerance:
            at = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), a.shape))
            x, y = float(a.flatten()[index].double()), float(b.flatten()[index].double())
            raise AssertionError(
                f"{name}: error {worst:.3g} exceeds {tolerance:.3g} at index {at}: "
                f"expected {y:.8g}, got {x:.8g} (rms of expected {rms:.3g}, shape {list(a.shape)})"
            )


def assert_equal(got: Any, expected: Any, *, what: str = "result") -> None:
    """Raise AssertionError unless the two agree in dtype and in every bit but NaN payloads."""
    for name, a, b in _pairs(got, expected, what):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype != b.dtype:
            raise AssertionError(f"{name}: expected dtype {b.dtype}, got {a.dtype}")
    assert_close(got, expected, tolerance=0.0, what=what)
