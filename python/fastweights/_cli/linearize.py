"""`fastweights linearize`: exchange the attention of a pretrained model and recover its quality."""

from __future__ import annotations

import argparse
import shutil
import time
from typing import Any

from fastweights._cli.terminal import existing, output_folder, read_texts, say, write_json

# Of the training time, what the new attention gets before the whole model: in trials more of it
# stopped paying.
_TRANSFER_SHARE = 0.3


def add_parser(commands: Any) -> None:
    """Adds the command."""
    p = commands.add_parser(
        "linearize",
        help="make a pretrained transformer's attention linear and train it to behave as before",
        description="Exchange the softmax attention of a pretrained model for linear attention "
        "with a window, teach it to imitate what it replaced (attention transfer), then recover "
        "the rest with LoRA, merged at the end. Interrupted with Ctrl-C, the same command goes on "
        "where it stopped.",
    )
    p.add_argument("model", metavar="MODEL", help="a Hugging Face folder or a .gguf file")
    p.add_argument("--out", metavar="DIR", required=True, help="folder for the new model")
    p.add_argument(
        "--recipe",
        choices=("stable", "lolcats", "hedgehog"),
        default="stable",
        help="stable: does not drift beyond its training length (default); "
        "lolcats, hedgehog: as published",
    )
    p.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="latest tokens kept under softmax (default: the recipe's, 64)",
    )
    p.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="training text (default: the docstrings of Python's standard library)",
    )
    p.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        metavar="N",
        help="training time (default: 10); 0 only converts",
    )
    p.add_argument(
        "--length",
        type=int,
        nargs="+",
        default=[512],
        metavar="N",
        help="tokens of a training sequence; several are taken in turn (default: 512)",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the training (default: 0)")
    p.add_argument("--json", metavar="FILE", help="write losses, times and sizes there")
    p.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Does it."""
    if options.minutes < 0:
        raise ValueError(f"expected --minutes of at least 0, got {options.minutes}")
    source = existing(options.model, "a model folder or a .gguf file")
    texts = read_texts(options.text) if options.text else None
    folder = output_folder(options.out)
    checkpoints = folder / "checkpoints"

    import fastweights as fw
    from fastweights import data

    started = time.monotonic()
    say(f"loading {source}")
    model, tokenizer = fw.load(source, dequantize=True)
    fw.linearize(model, options.recipe, window=options.window)
    stages: dict[str, Any] = {}
    if options.minutes:
        tokens = data.pack(
            tokenizer, data.standard_library_docstrings() if texts is None else texts
        )
        shares = {"transfer_attention": _TRANSFER_SHARE, "recover": 1 - _TRANSFER_SHARE}
        for name, share in shares.items():
            say(f"{name}: {options.minutes * share:.1f} minutes on {len(tokens)} tokens")
            checkpoint = checkpoints / f"{name}.safetensors"
            train = getattr(fw, name)
            log = train(
                model,
                tokens,
                minutes=options.minutes * share,
                seed=options.seed,
                length=options.length,
                checkpoint=checkpoint,
            )
            if log.interrupted:
                say("interrupted: the same command goes on from here")
                return 130
            stages[name] = {
                "steps": log.steps,
                "tokens": log.tokens,
                "seconds": log.seconds,
                "losses": log.losses,
            }
    fw.save(model, tokenizer, folder)
    shutil.rmtree(checkpoints, ignore_errors=True)
    say(f"wrote {folder}")
    if options.json:
        report = {
            "model": str(source),
            "out": str(folder),
            **model.config.fastweights,
            "seconds": time.monotonic() - started,
            "stages": stages,
        }
        write_json(options.json, report)
    return 0
