"""What replaces a function of another library: ours for CPU tensors, else the original."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def route(
    original: Callable[..., Any], ours: Callable[..., Any], calls: Counter[str], name: str
) -> Callable[..., Any]:
    """`original` with its name and signature, whose calls with CPU tensors go to `ours`.

    They are counted in ``calls[name]``, but for those within `torch.compile`, whose graph would
    depend on the count.
    """
    counted = count(ours, calls, name)

    @functools.wraps(original)
    def routed(*args: Any, **kwargs: Any) -> Any:
        return (counted if on_cpu(args, kwargs) else original)(*args, **kwargs)

    return routed


def count(ours: Callable[..., Any], calls: Counter[str], name: str) -> Callable[..., Any]:
    """`ours`, its calls counted in ``calls[name]``."""

    @functools.wraps(ours)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            calls[name] += 1
        return ours(*args, **kwargs)

    return counted


def on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the first tensor of a call is on the CPU."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device.type == "cpu"
    return False
