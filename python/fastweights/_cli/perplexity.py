"""`fastweights perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
from typing import Any

from fastweights._cli.base import add_adapter, open_adapted
from fastweights._cli.terminal import existing, read_texts


def add_parser(commands: Any) -> None:
    """Adds the command."""
    p = commands.add_parser(
        "perplexity",
        help="measure how well a model predicts a text",
        description="Perplexity of a text (lower is better): overall in pieces of --length "
        "tokens, or by the position in one long context.",
    )
    p.add_argument("model", metavar="DIR", help="a model folder or a .gguf file")
    p.add_argument("--text", nargs="+", metavar="FILE", required=True, help="the text, in UTF-8")
    p.add_argument(
        "--length", type=int, metavar="N", help="tokens per piece (default: 512; by position: all)"
    )
    p.add_argument(
        "--by-position",
        action="store_true",
        help="one figure per range of positions: to 512, 2k, 4k, 8k, 32k",
    )
    add_adapter(p)
    p.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Does it."""
    source = existing(options.model, "a model folder or a .gguf file")
    texts = read_texts(options.text)

    import fastweights as fw
    from fastweights import data

    model, tokenizer = open_adapted(source, options)
    tokens = data.pack(tokenizer, texts)
    if options.by_position:
        ends = [end for end in (512, 2048, 4096, 8192, 32768) if end <= len(tokens)] or [
            len(tokens)
        ]
        for bucket, value in fw.perplexity(
            model, tokens, length=options.length, by_position=tuple(ends)
        ).items():
            print(f"{bucket:>12}  {value:.3f}")
    else:
        print(f"{fw.perplexity(model, tokens, length=options.length or 512):.3f}")
    return 0
