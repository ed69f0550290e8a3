"""The command `fastweights`: make a transformer linear, quantize, fine-tune, run and measure it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastweights._cli import bench, finetune, generate, info, linearize, perplexity, quantize
from fastweights._cli.terminal import fail

_COMMANDS = (linearize, quantize, finetune, generate, perplexity, bench, info)

_EXAMPLE = """\
from a pretrained transformer to one whose speed and memory do not depend on the context:
  fastweights linearize SmolLM2-135M-Instruct/ --out linear/
  fastweights quantize linear/ --format int4 --out linear-int4/
  fastweights generate linear-int4/ "What is a mutex?" --chat
"""


def parser() -> argparse.ArgumentParser:
    """The command line, one subparser per command."""
    root = argparse.ArgumentParser(
        prog="fastweights",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        module.add_parser(commands)
    return root


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line; argparse's own exit for one that is not understood."""
    root = parser()
    options, rest = root.parse_known_args(arguments)
    # argparse takes no further words for a `*` argument once an option has come between.
    if options.command == "generate" and not any(word.startswith("-") for word in rest):
        options.prompts += rest
    elif rest:
        root.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `fastweights`; None takes the process's own.

    Returns:
        0; 2 for a request that cannot be met (one line on stderr says why); 130 if interrupted.
    """
    options = parse(arguments)
    try:
        result: int = options.run(options) or 0
        return result
    except (ValueError, OSError, RuntimeError) as error:
        return fail(options.command, error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
