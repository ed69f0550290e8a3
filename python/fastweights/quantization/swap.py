"""`quantize_`: swap the linear layers of a model for quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fastweights.ops.quantization.formats import resolve
from fastweights.ops.quantization.functional import quantize
from fastweights.ops.quantization.layers import QuantizedEmbedding, QuantizedLinear
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.quantization.calibrate import Solver, calibrate_
from fastweights.quantization.samples import read_samples
from fastweights.quantization.walk import set_module

__all__ = ["quantize_"]

Model = TypeVar("Model", bound=nn.Module)
Skip = Iterable[str] | Callable[[str, nn.Module], bool]


def quantize_(
    model: Model,
    format: str = "int4",
    *,
    group_size: int | None = None,
    activation: str = "float",
    skip: Skip = ("lm_head",),
    embedding_format: str | None = None,
    solver: Solver | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Model:
    """Quantize every `nn.Linear` of a model in place, to nearest or by a calibrated solver.

    Only modules whose type is exactly `nn.Linear` (and, with `embedding_format`, `nn.Embedding`)
    are swapped; a base layer inside an adapter is one of them, what an adapter trains whole
    (`modules_to_save`) is not. Float layers are freed one by one.

    Tied embeddings: a linear layer whose weight *is* the weight of an embedding is skipped unless
    `embedding_format` is given. Then both become quantized in that format and share one packed
    tensor (8 bits keep an embedding at 45 dB; 4 bits would be felt at both ends of the model). With
    None, embeddings stay as they are.

    Args:
        model: any module.
        format: see `fastweights.quantize`.
        group_size: inputs per scale; None means the format's own.
        activation: "float" or "int8", see `fastweights.quantized_linear`.
        skip: names (a layer is skipped if its qualified name equals one or ends with "." + one), or
            a predicate ``skip(qualified_name, module)``.
        embedding_format: "int8" or another format to quantize embeddings, and linear layers tied to
            them whatever `skip` says of those.
        solver: `GPTQ`, `AWQ`, `SmoothQuantPlus` or `RoundToNearest` of `fastweights.quantization`,
            for all that is not an embedding or tied to one; None rounds to nearest, as `quantize`
            does. It goes through the model block by block (the entries of its `nn.ModuleList`s,
            and what lies outside of them), each behind those that are rounded already.
        calibration: what solvers run through the model: a tensor whose rows are samples (int64
            tokens ``[B, T]``); batches, such as a DataLoader: a tensor, a tuple of positional or a
            mapping of keyword arguments each; or, with `tokenizer`, texts, of which up to 128
            sequences of 512 tokens are taken. A few thousand tokens suffice.
        tokenizer: of Hugging Face, for texts.
        checkpoint: a folder. Every block is written to it when it is done, and read from it by a
            run of the same solver, format, calibration and float model.
        progress: show a bar, where tqdm is installed.

    Returns:
        The model. Interrupted, it has the blocks done so far quantized and the others untouched.

    Raises:
        ValueError: unknown format or activation, or nothing to swap; a solver without calibration,
            one that does not reach a layer, or a checkpoint of another run.
        RuntimeError: a weight that is not finite.

    Example:
        >>> import torch, fastweights as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
        >>> fw.quantize_(model, "int4", group_size=32)[1]
        QuantizedLinear(64, 32, bias=True, int4, group_size=32, activation=float)
    """
    skipped = skip if callable(skip) else _by_name(tuple(skip))
    plan = _plan(model, skipped, embedding_format is not None)
    if not plan:
        raise ValueError(
            "quantize_: expected a model with nn.Linear layers that are not skipped, got none"
        )
    if solver is not None:
        name, width = resolve(format, group_size)
        target = {"format": name, "group_size": width, "activation": activation}
        _solve(model, plan, solver, calibration, tokenizer, checkpoint, progress, target)
    tables: dict[int, QuantizedTensor] = {}
    for names, table in plan:
        module = model.get_submodule(names[0])
        if isinstance(module, QuantizedLinear):
            continue
        assert isinstance(module, (nn.Linear, nn.Embedding))
        if table is not None and embedding_format is not None:
            if table not in tables:
                tables[table] = quantize(
                    module.weight, embedding_format, group_size=group_size, activation=activation
                )
            weight = tables[table]
        else:
            weight = quantize(module.weight, format, group_size=group_size, activation=activation)
        swapped = (
            QuantizedEmbedding(weight, module.weight.dtype)
            if isinstance(module, nn.Embedding)
            else QuantizedLinear(weight, module.bias)
        )
        swapped.train(module.training)
        for name in names:
            set_module(model, name, swapped)
    return model


def _solve(
    model: nn.Module,
    plan: list[tuple[list[str], int | None]],
    solver: Solver,
    calibration: Any,
    tokenizer: Any,
    checkpoint: str | Path | None,
    progress: bool,
    target: dict[str, Any],
) -> None:
    """Lets a solver quantize what is no embedding; a layer of several names gets all of them."""
    if calibration is None and solver.calibrated:
        raise ValueError(f"quantize_: expected calibration with {type(solver).__name__}, got None")
    samples = [] if calibration is None else read_samples(calibration, tokenizer)
    linears = [names for names, table in plan if table is None]
    calibrate_(
        model, [names[0] for names in linears], solver, samples, target,
        checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    for first, *others in linears:
        for name in others:
            set_module(model, name, model.get_submodule(first))


def _plan(
    model: nn.Module, skipped: Callable[[str, nn.Module], bool], embeddings: bool
) -> list[tuple[list[str], int | None]]:
    """What to swap: all the names of a module, and the identity of its table if it is an embedding.

    Only names, so that every float layer can be freed as soon as it is swapped.
    """
    modules = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if n]
    tables = {id(m.weight) for _, m in modules if type(m) is nn.Embedding}
    names: dict[int, list[str]] = {}
    table_of: dict[int, int | None] = {}
    for name, module in modules:
        if type(module) not in (nn.Linear, nn.Embedding) or getattr(module, "max_norm", None):
            continue
        if "modules_to_save" in name.split("."):  # an adapter's own, which is trained
            continue
        table = id(module.weight) if id(module.weight) in tables else None
        if embeddings if table is not None else not skipped(name, module):
            names.setdefault(id(module), []).append(name)
            table_of[id(module)] = table
    return [(names[key], table_of[key]) for key in names]


def _by_name(names: tuple[str, ...]) -> Callable[[str, nn.Module], bool]:
    def skipped(name: str, module: nn.Module) -> bool:
        return any(name == n or name.endswith("." + n) for n in names)

    return skipped
