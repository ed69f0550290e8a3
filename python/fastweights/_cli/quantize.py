"""`fastweights quantize`: store the linear layers of a model in few bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastweights._cli.terminal import existing, output_folder, read_texts, say
from fastweights.ops.quantization.formats import ALIASES, FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from fastweights.quantization import Solver

# Text for solvers: 4096 tokens, a minute or two of one core for a model of 135 million weights.
_WINDOWS, _LENGTH = 8, 512
_SOLVERS = {
    "nearest": "RoundToNearest",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "smoothquant+": "SmoothQuantPlus",
}


def add_parser(commands: Any) -> None:
    """Adds the command."""
    p = commands.add_parser(
        "quantize",
        help="store a model's linear layers in few bits",
        description="Quantize the linear layers of a model and write it as a new folder.",
    )
    p.add_argument(
        "model", metavar="DIR", help="a model folder, as `linearize` writes it, or a .gguf file"
    )
    p.add_argument(
        "--format",
        choices=(*FORMATS, *ALIASES),
        default="int4",
        metavar="FORMAT",
        help="of the weights, see docs/quantization.md (default: int4)",
    )
    p.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="inputs that share a scale (default: the format's, such as 64)",
    )
    p.add_argument(
        "--activation",
        choices=("int8", "float"),
        default="int8",
        help="what the layers do with their input: int8 is fast (default), float is exact",
    )
    p.add_argument(
        "--solver",
        choices=tuple(_SOLVERS),
        default="nearest",
        help="how weights are rounded (default: nearest); gptq takes minutes and loses far less",
    )
    p.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="what solvers calibrate on (default: the docstrings of Python's standard library)",
    )
    p.add_argument(
        "--checkpoint", metavar="DIR", help="folder for a solver to resume from if interrupted"
    )
    p.add_argument("--out", metavar="DIR", required=True, help="folder for the new model")
    p.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Does it."""
    source = existing(options.model, "a model folder")
    folder = output_folder(options.out)
    if folder.resolve() == source.resolve():
        raise ValueError(f"expected --out to be another folder than {source}")
    if options.text and options.solver == "nearest":
        raise ValueError("expected --text with another --solver than nearest, which reads none")
    texts = read_texts(options.text) if options.text else None

    import fastweights as fw
    from fastweights import data, quantization

    say(f"loading {source}")
    model, tokenizer = fw.load(source, dequantize=True)
    solver: Solver = getattr(quantization, _SOLVERS[options.solver])()
    tokens = None
    if solver.calibrated:
        texts = data.standard_library_docstrings() if texts is None else texts
        tokens = data.pack(tokenizer, texts)
    quantize_for_decoding(
        model, options.format, options.group_size, options.activation, solver, tokens,
        options.checkpoint,
    )  # fmt: skip
    fw.save(model, tokenizer, folder)
    say(f"wrote {folder}: {_megabytes(source):.0f} MB to {_megabytes(folder):.0f} MB")
    return 0


def quantize_for_decoding(
    model: Any,
    format: str = "int4",
    group_size: int | None = None,
    activation: str = "int8",
    solver: Solver | None = None,
    calibration: Tensor | None = None,
    checkpoint: str | Path | None = None,
) -> None:
    """Quantize every linear layer, the output layer and a tied embedding in 8 bits.

    With a solver, which may want text (`calibration`, int64 `[N]`), the others are its matter; to
    nearest without one.

    The output layer is a quarter of a small model and read for every token; 8 bits halve the time
    of 16 and keep the embedding that may share its table.
    """
    from fastweights import data, quantize_

    settings: dict[str, Any] = {"group_size": group_size, "activation": activation}
    if solver is not None:
        tokens = None
        if calibration is not None:
            tokens = data.windows(calibration, min(_LENGTH, len(calibration)), _WINDOWS)
        quantize_(
            model, format, **settings, solver=solver, calibration=tokens, checkpoint=checkpoint
        )
    quantize_(model, format, **settings, skip=(), embedding_format="int8")


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return sum(f.stat().st_size for f in files) / 1e6
