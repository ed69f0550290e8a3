"""What replaces a function of another library: ours for CPU tensors, else the original."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the first tensor of a call is on the CPU."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device.type == "cpu"
    return False


def route(
    original: Callable[..., Any],
    ours: Callable[..., Any],
    calls: Counter[str],
    name: str,
    serves: Callable[[tuple[Any, ...], dict[str, Any]], bool] = on_cpu,
) -> Callable[..., Any]:
    """`original` with its name and signature, whose calls go to `ours` if that `serves` them.

    They are counted in ``calls[name]``, but for those within `torch.compile`, whose graph would
    depend on the count.
    """
    counted = count(ours, calls, name)

    @functools.wraps(original)
    def routed(*args: Any, **kwargs: Any) -> Any:
        return (counted if serves(args, kwargs) else original)(*args, **kwargs)

    return routed


def count(ours: Callable[..., Any], calls: Counter[str], name: str) -> Callable[..., Any]:
    """`ours`, its calls counted in ``calls[name]``."""

    @functools.wraps(ours)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            calls[name] += 1
        return ours(*args, **kwargs)

    return counted


@contextmanager
def for_a_while(
    patch: Callable[[], None], unpatch: Callable[[], None], is_patched: Callable[[], bool]
) -> Iterator[None]:
    """`patch` for the length of a ``with``; what was patched before stays so."""
    before = is_patched()
    patch()
    try:
        yield
    finally:
        if not before:
            unpatch()


class Attributes:
    """Attributes of modules and classes that were exchanged, to be given back."""

    def __init__(self) -> None:
        self._exchanged: list[tuple[Any, str, Any, Any]] = []

    def __contains__(self, attribute: tuple[Any, str]) -> bool:
        return any(
            entry[0] is attribute[0] and entry[1] == attribute[1] for entry in self._exchanged
        )

    def __bool__(self) -> bool:
        return bool(self._exchanged)

    def exchange(self, owner: Any, name: str, ours: Any) -> None:
        """Sets an attribute and remembers what it was."""
        original = vars(owner)[name]
        setattr(owner, name, ours)
        self._exchanged.append((owner, name, original, vars(owner)[name]))

    def restore(self) -> None:
        """Sets them back, but for those that somebody else has set since."""
        while self._exchanged:
            owner, name, original, ours = self._exchanged.pop()
            if vars(owner).get(name) is ours:
                setattr(owner, name, original)
