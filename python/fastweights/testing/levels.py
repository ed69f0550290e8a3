"""The CPU level within a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastweights._load import _C

__all__ = ["available_cpu_levels", "cpu_level"]


def available_cpu_levels() -> list[str]:
    """Levels that this machine can run, weakest first."""
    levels: list[str] = _C.build_facts()["cpu_levels"]
    return levels[: levels.index(_C.best_cpu_level()) + 1]


@contextmanager
def cpu_level(name: str) -> Iterator[None]:
    """Run every op at the named level inside the block, for all threads of the process.

    Args:
        name: one of `available_cpu_levels()`.

    Raises:
        RuntimeError: if the machine or the build lacks the level.
    """
    before = _C.cpu_level()
    _C.set_cpu_level(name)
    try:
        yield
    finally:
        _C.set_cpu_level(before)
