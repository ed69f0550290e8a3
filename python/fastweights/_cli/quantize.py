"""`fastweights quantize`: store the linear layers of a model in few bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastweights._cli.terminal import existing, output_folder, read_texts, say
from fastweights.ops.quantization.formats import ALIASES, FORMATS

if TYPE_CHECKING:
    from torch import Tensor

# Text for GPTQ: 4096 tokens, 85 seconds of one core for a model of 135 million weights.
_WINDOWS, _LENGTH = 8, 512


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
        "--calibrate",
        nargs="*",
        metavar="FILE",
        help="round by GPTQ, which takes minutes and loses far less, on these texts (none named: "
        "the docstrings of Python's standard library)",
    )
    p.add_argument("--out", metavar="DIR", required=True, help="folder for the new model")
    p.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Does it."""
    source = existing(options.model, "a model folder")
    folder = output_folder(options.out)
    if folder.resolve() == source.resolve():
        raise ValueError(f"expected --out to be another folder than {source}")
    texts = read_texts(options.calibrate) if options.calibrate else None

    import fastweights as fw
    from fastweights import data

    say(f"loading {source}")
    model, tokenizer = fw.load(source, dequantize=True)
    tokens = None
    if options.calibrate is not None:
        tokens = data.pack(
            tokenizer, data.standard_library_docstrings() if texts is None else texts
        )
    quantize_for_decoding(model, options.format, options.group_size, options.activation, tokens)
    fw.save(model, tokenizer, folder)
    say(f"wrote {folder}: {_megabytes(source):.0f} MB to {_megabytes(folder):.0f} MB")
    return 0


def quantize_for_decoding(
    model: Any,
    format: str = "int4",
    group_size: int | None = None,
    activation: str = "int8",
    calibration: Tensor | None = None,
) -> None:
    """Quantize every linear layer, the output layer and a tied embedding in 8 bits.

    With text (`calibration`, int64 `[N]`) the layers are rounded by GPTQ, else to nearest.

    The output layer is a quarter of a small model and read for every token; 8 bits halve the time
    of 16 and keep the embedding that may share its table.
    """
    from fastweights import data, quantize_
    from fastweights.quantization import gptq_

    if calibration is not None:
        length = min(_LENGTH, len(calibration))
        tokens = data.windows(calibration, length, _WINDOWS)
        gptq_(model, tokens, format, group_size=group_size, activation=activation)
    quantize_(
        model,
        format,
        group_size=group_size,
        activation=activation,
        skip=(),
        embedding_format="int8",
    )


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return sum(f.stat().st_size for f in files) / 1e6
