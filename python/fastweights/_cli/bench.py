"""`fastweights bench`: time ops against their rivals."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command."""
    p = commands.add_parser(
        "bench",
        help="time ops against the reference and installed rivals",
        description="Check an op, then time it, the reference and every installed rival in turn, "
        "forward and backward, beside what the machine reaches. Nothing is timed that is wrong.",
    )
    p.add_argument("ops", metavar="OP", nargs="*", help="ops or families (default: all)")
    p.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    p.add_argument("--out", type=Path, metavar="DIR", help="write DIR/<family>.md and .json")
    p.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Does it."""
    from fastweights.testing.bench import bench

    return bench(options.ops, case=options.case, out=options.out)
