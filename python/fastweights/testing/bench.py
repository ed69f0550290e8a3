"""`fastweights bench`: an op against its reference and its rivals, on this machine, in one process.

Correctness comes first: on red nothing is timed. The contenders run in turn, so that a slow phase
of the machine hits all of them, and the smallest of many readings counts. Shares of the peak and of
the bandwidth refer to what `roofline` measures in the same run.
"""

from __future__ import annotations

import datetime
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastweights._tables import print_table
from fastweights.testing import checks, machine, roofline
from fastweights.testing.calls import cotangent, leaves_of
from fastweights.testing.opspec import BenchCase, OpSpec, Peer, Sample, all_specs
from fastweights.testing.results import HEADER, Row, cells, save

__all__ = ["bench", "time_case"]

# Seconds of readings per contender and pass; a noisy result is measured once more.
_BUDGET = 1.0
_NOISY = 1.25


@dataclass
class _Contender:
    name: str
    call: Callable[[], object]
    precision: str = "highest"
    threads: int = 0
    readings: list[float] = field(default_factory=list)
    spent: float = 0.0

    def read(self) -> None:
        """One reading: as many calls as fill two milliseconds."""
        calls = 1 if not self.readings else max(1, int(2e-3 / min(self.readings)))
        torch.set_float32_matmul_precision(self.precision)
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
        taken = time.perf_counter() - start
        self.readings.append(taken / calls)
        self.spent += taken

    @property
    def noisy(self) -> bool:
        ordered = sorted(self.readings)
        return ordered[len(ordered) // 4] > _NOISY * ordered[0]


@contextmanager
def _restored_settings() -> Iterator[int]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _in_turn(contenders: Sequence[_Contender]) -> None:
    for contender in contenders:
        contender.call()
    for _ in range(2):
        for contender in contenders:
            contender.spent = 0.0
        while waiting := [c for c in contenders if c.spent < _BUDGET]:
            for contender in waiting:
                contender.read()
        if not any(contender.noisy for contender in contenders):
            return


def _forward(function: Callable[..., Any], call: Sample) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return function(*call.args, **call.kwargs)

    return run


def _both(function: Callable[..., Any], call: Sample, leaves: list[Tensor]) -> Callable[[], object]:
    weights: list[Tensor] = []

    def run() -> object:
        outputs = pytree.tree_leaves(function(*call.args, **call.kwargs))
        ends = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if not weights:
            # In the output's memory order: the op behind it would hand it back like that.
            weights.extend(torch.empty_like(o).copy_(cotangent(o, i)) for i, o in enumerate(ends))
        return torch.autograd.grad(ends, leaves, weights, allow_unused=True)

    return run


def _peers(
    spec: OpSpec, calls: Sequence[Sample]
) -> Iterator[tuple[Peer, Callable[..., Any], list[Sample]]]:
    for peer in spec.peers:
        try:
            function = peer.load()
        except ImportError:
            continue
        adapted = [given for call in calls if (given := peer.adapt(call)) is not None]
        if adapted:
            yield peer, function, adapted


def _calls(spec: OpSpec, case: BenchCase, dtype: torch.dtype, backward: bool) -> list[Sample]:
    calls = [case.make(dtype) for _ in range(case.copies)]
    if not backward:
        return calls
    calls = [call.map_tensors(lambda t: t.detach()) for call in calls]
    for call in calls:
        for leaf in (leaf for group in leaves_of(spec, call).values() for leaf in group):
            leaf.requires_grad_()
    return calls


def _contenders(
    spec: OpSpec, case: BenchCase, dtype: torch.dtype, threads: int, backward: bool
) -> list[_Contender]:
    def once(function: Callable[..., Any], given: Sample) -> Callable[[], object]:
        if not backward:
            return _forward(function, given)
        return _both(function, given, [t for t in given.tensors() if t.requires_grad])

    # One turn for all: whoever calls meets the copy that was used the longest ago.
    turn = itertools.count()

    def work(function: Callable[..., Any], given: Sequence[Sample]) -> Callable[[], object]:
        calls = [once(function, call) for call in given]
        return lambda: calls[next(turn) % len(calls)]()

    calls = _calls(spec, case, dtype, backward)
    found = [_Contender("fastweights", work(spec.function, calls), threads=threads)]
    if spec.matmul and dtype == torch.float32:
        found.append(_Contender("fastweights, medium", found[0].call, "medium", threads))
    if not backward and threads > 1:
        found.append(_Contender("one thread", found[0].call, threads=1))
    if case.reference:
        found.append(_Contender("reference", work(spec.reference, calls), threads=threads))
    for peer, function, given in _peers(spec, calls):
        if backward and not peer.backward:
            continue
        both = peer.matmul and dtype == torch.float32
        for precision in ("highest", "medium") if both else ("highest",):
            name = f"{peer.name}, {precision}" if both else peer.name
            found.append(_Contender(name, work(function, given), precision, threads))
    return found


def time_case(spec: OpSpec, case: BenchCase, dtype: torch.dtype) -> list[Row]:
    """Time every contender on one case: ours first, then the reference, then the peers."""
    with _restored_settings() as threads:
        forward = _contenders(spec, case, dtype, threads, backward=False)
        _in_turn(forward)
        both: list[_Contender] = []
        if case.backward and spec.differentiable:
            both = _contenders(spec, case, dtype, threads, backward=True)
            _in_turn(both)
    least = {c.name: min(c.readings) for c in forward}
    least_both = {c.name: min(c.readings) for c in both}
    one = least.pop("one thread", None)
    return [
        Row(
            case=case.name,
            dtype=str(dtype).removeprefix("torch."),
            contender=name,
            forward=seconds,
            both=least_both.get(name),
            forward_one_thread=one if name == "fastweights" else None,
            flops=case.flops,
            bytes=case.bytes * dtype.itemsize / 4,
            rows=case.rows,
        )
        for name, seconds in least.items()
    ]


def bench(names: Sequence[str] = (), *, case: str = "", out: Path | None = None) -> int:
    """Check, time and print ops.

    Args:
        names: ops or families; none means every op that has bench cases.
        case: only cases whose name contains this.
        out: folder where `<family>.md` and `<family>.json` are written; None writes nothing.

    Returns:
        0, or 1 if an op failed its tests (then it is not timed) or a name is unknown.
    """
    specs = [s for s in all_specs() if s.bench and (not names or {s.name, s.family} & set(names))]
    unknown = set(names) - {n for s in specs for n in (s.name, s.family)}
    if unknown or not specs:
        known = ", ".join(s.name for s in all_specs() if s.bench)
        print(
            f"bench: expected ops among {known}, got {', '.join(sorted(unknown))}", file=sys.stderr
        )
        return 1
    status = 0
    for spec in specs:
        cases = [c for c in spec.bench if case in c.name]
        try:
            for dtype in {dtype for c in cases for dtype in c.dtypes}:
                checks.matches_reference(spec, dtype)
        except AssertionError as problem:
            print(f"bench: {spec.name} is wrong, so it is not timed:\n{problem}", file=sys.stderr)
            status = 1
            continue
        roof = roofline.measure()
        rows = [row for c in cases for dtype in c.dtypes for row in time_case(spec, c, dtype)]
        print(f"\n{spec.name} ({machine.facts()['cpu']}, {roof.threads} threads)")
        print_table(HEADER, cells(rows, roof))
        if out is not None:
            result = {
                "date": datetime.date.today().isoformat(),
                "machine": machine.facts(),
                "roofline": asdict(roof),
                "rows": [asdict(row) for row in rows],
            }
            save(out, spec.family, spec.name, result)
    return status
