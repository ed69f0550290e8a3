"""`fastweights finetune`: train an adapter on text, over float or quantized weights."""

from __future__ import annotations

import argparse
import resource
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastweights._cli.base import FLOATS, add_base, open_base
from fastweights._cli.terminal import existing, output_folder, read_texts, say, write_json

if TYPE_CHECKING:
    from fastweights.adapters import LoRA
    from fastweights.training import TrainingLog

_ADAPTERS = ("lora", "dora", "pissa")
_HELD_OUT_SHARE = 0.05


def add_parser(commands: Any) -> None:
    """Adds the command."""
    p = commands.add_parser(
        "finetune",
        help="train an adapter on text",
        description="Train LoRA on all linear layers of a model, whose own weights stay as they "
        "are: float, or quantized (QLoRA). DIR becomes an adapter folder that PEFT reads, too. "
        "Interrupted with Ctrl-C, the same command goes on where it stopped.",
        epilog="over weights of 4 bits, then use it over the same:\n"
        "  fastweights finetune MODEL --text notes.txt --base nf4 --out notes/\n"
        '  fastweights generate MODEL --base nf4 --adapter notes/ "Today"\n',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="MODEL", help="a Hugging Face folder or a .gguf file")
    p.add_argument("--text", nargs="+", metavar="FILE", required=True, help="the text, in UTF-8")
    p.add_argument(
        "--held-out",
        nargs="+",
        metavar="FILE",
        help="text to test on (default: the last twentieth of --text, which is not trained on)",
    )
    p.add_argument("--out", metavar="DIR", required=True, help="folder for the adapter")
    p.add_argument(
        "--adapter",
        choices=_ADAPTERS,
        default="lora",
        help="lora (default); dora learns the rows' norms as well; pissa starts from the principal "
        "components of float weights",
    )
    p.add_argument("--rank", type=int, default=16, metavar="N", help="of the adapter (default: 16)")
    p.add_argument(
        "--alpha", type=float, metavar="X", help="its scale times the rank (default: the rank)"
    )
    p.add_argument(
        "--dropout", type=float, default=0.0, metavar="X", help="of its input (default: 0)"
    )
    add_base(p)
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, metavar="N", help="training time (default: 10)")
    budget.add_argument("--steps", type=int, metavar="N", help="optimizer steps instead")
    p.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens of a sequence (default: 512)"
    )
    p.add_argument(
        "--accumulation", type=int, default=1, metavar="N", help="sequences of a step (default: 1)"
    )
    p.add_argument(
        "--lr", type=float, default=5e-4, metavar="X", help="peak learning rate (default: 5e-4)"
    )
    p.add_argument(
        "--lora-plus",
        type=float,
        default=1.0,
        metavar="X",
        help="how many times as fast B learns as A (default: 1; LoRA+ suggests 16)",
    )
    p.add_argument(
        "--optimizer",
        choices=("adamw", "adamw8bit"),
        default="adamw",
        help="adamw (default), or with states of 8 bits",
    )
    p.add_argument(
        "--evaluate-every",
        type=int,
        default=50,
        metavar="N",
        help="steps between two looks at the held-out text (default: 50)",
    )
    p.add_argument(
        "--recompute",
        action="store_true",
        help="compute activations again in the backward: less memory, a third more time",
    )
    p.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the products (default: what this machine is faster in)",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of everything (default: 0)")
    p.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Does it."""
    source = existing(options.model, "a model folder or a .gguf file")
    if options.adapter == "pissa" and options.base not in (None, *FLOATS):
        raise ValueError(f"expected a float --base with --adapter pissa, got {options.base}")
    texts = read_texts(options.text)
    unseen = read_texts(options.held_out) if options.held_out else None
    folder = output_folder(options.out)
    if folder.resolve() == source.resolve():
        raise ValueError(f"expected --out to be another folder than {source}")
    adapter = _adapter(options)

    import torch

    import fastweights as fw
    from fastweights import data
    from fastweights.adapters import save_peft

    say(f"loading {source}")
    model, tokenizer = open_base(source, options.base)
    tokens = data.pack(tokenizer, texts)
    if unseen is None:
        split = len(tokens) - int(_HELD_OUT_SHARE * len(tokens))
        tokens, held_out = tokens[:split], tokens[split:]
    else:
        held_out = data.pack(tokenizer, unseen)
    torch.manual_seed(options.seed)
    fw.adapt(model, adapter)
    minutes = 10.0 if options.minutes is None and options.steps is None else options.minutes
    budget = f"{minutes:g} minutes" if options.steps is None else f"{options.steps} steps"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{budget} on {len(tokens)} tokens, {trained / 1e6:.2f} million numbers to train")
    checkpoint = folder / "checkpoint" / "training.safetensors"
    log = fw.training.finetune(
        model, tokens, held_out=held_out, steps=options.steps, minutes=minutes,
        length=options.length, accumulation=options.accumulation, lr=options.lr,
        ratio=options.lora_plus, optimizer=options.optimizer,
        evaluate_every=options.evaluate_every, recompute=options.recompute, seed=options.seed,
        checkpoint=checkpoint, precision=options.precision,
    )  # fmt: skip
    if log.interrupted:
        kept = "the same command goes on from here" if checkpoint.exists() else "nothing was kept"
        say(f"interrupted: {kept}")
        return 130
    save_peft(model, folder, base_model=str(source), task_type="CAUSAL_LM")
    write_json(folder / "training.json", _summary(options, source, log))
    shutil.rmtree(checkpoint.parent)
    before, after = log.held_out[0], log.held_out[log.steps]
    say(f"held-out loss from {before:.4f} to {after:.4f}, {log.tokens_per_second:.0f} tokens/s")
    say(f"wrote {folder}")
    return 0


def _adapter(options: argparse.Namespace) -> LoRA:
    from fastweights.adapters import LoRA, PiSSA

    settings: dict[str, Any] = {
        "rank": options.rank,
        "alpha": options.alpha,
        "dropout": options.dropout,
    }
    if options.adapter == "pissa":
        return PiSSA(**settings)
    return LoRA(**settings, dora=options.adapter == "dora")


def _summary(options: argparse.Namespace, source: Path, log: TrainingLog) -> dict[str, Any]:
    """What was done, as data."""
    kept = (
        "base", "adapter", "rank", "alpha", "dropout", "length", "accumulation", "lr", "lora_plus",
        "optimizer", "recompute", "seed",
    )  # fmt: skip
    return {
        "model": str(source),
        **{name: getattr(options, name) for name in kept},
        "steps": log.steps,
        "tokens": log.tokens,
        "seconds": log.seconds,
        "tokens_per_second": log.tokens_per_second,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": log.losses,
        "held_out": log.held_out,
    }
