"""Which arithmetic a training runs in: what this machine multiplies matrices fastest in."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

PRECISIONS = ("auto", "float32", "bfloat16")

# bfloat16 costs accuracy and conversions, so it must be clearly faster to be worth it.
_WORTH_IT = 1.3


def resolve_precision(precision: str) -> str:
    """Names the arithmetic: "auto" times float32 and bfloat16 once per process.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"train: expected precision 'auto', 'float32' or 'bfloat16', got {precision!r}"
        )
    return _fastest() if precision == "auto" else precision


def autocast(precision: str) -> AbstractContextManager[object]:
    """The context in which matrix products run in `precision`; parameters stay as they are."""
    if precision == "bfloat16":
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


@cache
def _fastest() -> str:
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    worth_it = seconds[torch.float32] > _WORTH_IT * seconds[torch.bfloat16]
    return "bfloat16" if worth_it else "float32"


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Least time of a small product; one repetition suffices where it is hopelessly slow."""
    a = torch.ones(256, 512, dtype=dtype)
    b = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    deadline = time.perf_counter() + 0.2
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > deadline:
            break
    return best
