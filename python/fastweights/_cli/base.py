"""The model that a command works on: its weights as they are or in another format, an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastweights._cli.terminal import existing
from fastweights.ops.quantization.formats import ALIASES, FORMATS

FLOATS = ("float32", "bfloat16")


def add_base(p: argparse.ArgumentParser) -> None:
    """Adds --base."""
    p.add_argument(
        "--base",
        choices=(*FLOATS, *FORMATS, *ALIASES),
        metavar="FORMAT",
        help="weights of the linear layers: float32, bfloat16, or a format of docs/quantization.md "
        "such as nf4 (default: as they are stored)",
    )


def add_adapter(p: argparse.ArgumentParser) -> None:
    """Adds --adapter, a folder, and --base."""
    p.add_argument(
        "--adapter", metavar="DIR", help="an adapter folder of `finetune` or PEFT to put on it"
    )
    add_base(p)


def open_base(source: Path, base: str | None) -> tuple[Any, Any]:
    """The model, its linear layers in the format `base`, and its tokenizer."""
    import torch

    import fastweights as fw

    if base is None:
        return fw.load(source)
    dtype = getattr(torch, base) if base in FLOATS else torch.float32
    model, tokenizer = fw.load(source, dtype=dtype, dequantize=True)
    if base not in FLOATS:
        fw.quantize_(model, base)
    return model, tokenizer


def open_adapted(source: Path, options: argparse.Namespace) -> tuple[Any, Any]:
    """What --base and --adapter make of the model at `source`, and its tokenizer."""
    adapter = existing(options.adapter, "an adapter folder") if options.adapter else None
    model, tokenizer = open_base(source, options.base)
    if adapter is not None:
        from fastweights.adapters import load_peft

        load_peft(model, adapter)
    return model, tokenizer
