"""Results of the benchmark: how they are printed and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastweights._tables import markdown_table
from fastweights.testing import roofline

__all__ = ["HEADER", "Row", "cells", "save"]


@dataclass(frozen=True)
class Row:
    """One contender on one case. Seconds are the smallest reading; None: not measured."""

    case: str
    dtype: str
    contender: str
    forward: float
    both: float | None
    forward_one_thread: float | None
    flops: float
    bytes: float
    rows: int


HEADER = (
    "case",
    "dtype",
    "contender",
    "forward ms",
    "× ours",
    "fwd+bwd ms",
    "× ours",
    "ns/token/head",
    "% FMA peak",
    "% bandwidth",
    "threads ×",
)


def cells(rows: Sequence[Row], roof: roofline.Roofline) -> list[tuple[str, ...]]:
    """The rows under `HEADER`, as text."""
    table: list[tuple[str, ...]] = []
    for row in rows:
        ours = next(r for r in rows if (r.case, r.dtype) == (row.case, row.dtype))
        mine = row is ours
        table.append(
            (
                row.case,
                row.dtype,
                row.contender,
                f"{row.forward * 1e3:.3f}",
                f"{row.forward / ours.forward:.2f}",
                f"{row.both * 1e3:.3f}" if row.both else "-",
                f"{row.both / ours.both:.2f}" if row.both and ours.both else "-",
                f"{row.forward / row.rows * 1e9:.0f}" if row.rows else "-",
                f"{100 * row.flops / row.forward / roof.flops_all:.0f}" if mine else "-",
                f"{100 * row.bytes / row.forward / roof.read:.0f}" if mine else "-",
                f"{one / row.forward:.2f}" if (one := row.forward_one_thread) else "-",
            )
        )
    return table


def _document(family: str, results: dict[str, Any]) -> str:
    parts = [
        f"# {family}: measured",
        "",
        "Written by `fastweights bench`. Times are the smallest of many readings, all contenders in"
        " turn in one process; × ours: the contender's time over that of fastweights. % FMA peak"
        " and % bandwidth (of reading) refer to what the same run measured with all threads.",
    ]
    for op, result in results.items():
        roof = roofline.Roofline(**result["roofline"])
        rows = [Row(**row) for row in result["rows"]]
        where = "; ".join(f"{name} {value}" for name, value in result["machine"].items())
        parts += [
            "",
            f"## {op}",
            "",
            f"{result['date']}. {where}. FMA peak {roof.flops_one / 1e9:.0f} GFLOP/s on one thread,"
            f" {roof.flops_all / 1e9:.0f} on {roof.threads}; read {roof.read / 1e9:.1f}, copy"
            f" {roof.copy / 1e9:.1f}, update {roof.update / 1e9:.1f} GB/s.",
            "",
            markdown_table(HEADER, cells(rows, roof)),
        ]
    return "\n".join(parts) + "\n"


def save(out: Path, family: str, op: str, result: dict[str, Any]) -> None:
    """Put an op's result into the JSON of its family and write the Markdown anew."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{family}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results = dict(sorted((results | {op: result}).items()))
    path.write_text(json.dumps(results, indent=1) + "\n")
    (out / f"{family}.md").write_text(_document(family, results))
