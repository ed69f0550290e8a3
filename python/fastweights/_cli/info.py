"""`fastweights info`: what is installed and what it supports."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command."""
    p = commands.add_parser(
        "info",
        help="print versions, CPU level and what is supported",
        description="Print what a bug report needs, then every op with its devices, dtypes and "
        "gradients.",
    )
    p.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Does it."""
    import fastweights as fw
    from fastweights.testing.support import print_support

    fw.show_config()
    print()
    print_support()
    return 0
