"""What the machine can do, measured in the run that uses it: multiply-adds and memory traffic.

`python -m fastweights.testing.roofline` prints it, with the share of the peak that the register
tile of core/gemm.h reaches on 128 x 128 x 128 blocks at each CPU level.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fastweights._load import _C
from fastweights._tables import print_table
from fastweights.testing.levels import available_cpu_levels, cpu_level

__all__ = ["Roofline", "bandwidth", "measure", "peak_flops", "tile_share"]

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


def tile_share(*, bf16: bool = False) -> float:
    """Share of the one-thread peak that products of 128 x 128 x 128 from cache reach.

    Peak and tile are read in turn, so that both see the same clock; the best of each counts.
    """
    pairs = [(peak_flops(1, bf16=bf16), _C.gemm_flops(bf16)) for _ in range(_REPEATS)]
    return max(tile for _, tile in pairs) / max(peak for peak, _ in pairs)


def _report() -> None:
    rows = []
    for level in available_cpu_levels():
        with cpu_level(level):
            for name, bf16 in (("float32", False), ("bfloat16", True)):
                peak, share = peak_flops(1, bf16=bf16), tile_share(bf16=bf16)
                rows.append((level, name, f"{peak / 1e9:.1f}", f"{100 * share:.0f}"))
    print_table(("level", "operands", "peak GFLOP/s, one thread", "% reached by the tile"), rows)
    found = measure()
    flops = f"{found.threads} threads: {found.flops_all / 1e9:.1f} GFLOP/s"
    memory = [f"{kind} {getattr(found, kind) / 1e9:.1f}" for kind in ("read", "copy", "update")]
    print(f"{flops}; {', '.join(memory)} GB/s")


if __name__ == "__main__":
    _report()
