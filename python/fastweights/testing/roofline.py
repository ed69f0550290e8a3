"""What the machine can do, measured in the run that uses it: multiply-adds and memory traffic."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fastweights._load import _C

__all__ = ["Roofline", "bandwidth", "measure", "peak_flops"]

# Far larger than any last-level cache share of a core: 256 MiB in all.
_STREAM_FLOATS = 64 * 2**20
_REPEATS = 5


@dataclass(frozen=True)
class Roofline:
    """Ceilings in FLOP/s and bytes/s, for one thread and for all threads of torch's pool.

    `update` counts one read and one write of each byte, as a decode step does to its state.
    """

    threads: int
    flops_one: float
    flops_all: float
    read: float
    copy: float
    update: float


def _at_once(threads: int, work: Callable[[int], float]) -> list[float]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(threads)))


def peak_flops(threads: int, *, bf16: bool = False) -> float:
    """Float32 (or bfloat16) FLOP/s of register-only multiply-adds on `threads` threads together.

    The best of five readings of about 30 ms, at the CPU level in force.
    """
    trial = _C.peak_flops(bf16, 100_000)
    rounds = max(1, int(100_000 * 0.03 * trial / (100_000 * _flops_per_round(bf16))))
    return max(
        sum(_at_once(threads, lambda _: _C.peak_flops(bf16, rounds))) for _ in range(_REPEATS)
    )


def _flops_per_round(bf16: bool) -> float:
    lanes = {"baseline": 4, "avx2": 8}.get(_C.cpu_level(), 16)
    return 12 * lanes * (4 if bf16 else 2)


def bandwidth(kind: Literal["read", "copy", "update"], threads: int) -> float:
    """Bytes per second to and from memory that `threads` threads reach together (best of five)."""
    x = np.ones(_STREAM_FLOATS, np.float32)
    y = np.ones(_STREAM_FLOATS, np.float32)
    share = _STREAM_FLOATS // threads
    touched = share * threads * 4 * (1 if kind == "read" else 2)

    def part(i: int) -> float:
        return _C.stream_seconds(kind, x, y, i * share, (i + 1) * share)

    return max(touched / max(_at_once(threads, part)) for _ in range(_REPEATS))


def measure() -> Roofline:
    """Measure every ceiling; about two seconds."""
    threads = torch.get_num_threads()
    return Roofline(
        threads=threads,
        flops_one=peak_flops(1),
        flops_all=peak_flops(threads),
        read=bandwidth("read", threads),
        copy=bandwidth("copy", threads),
        update=bandwidth("update", threads),
    )
