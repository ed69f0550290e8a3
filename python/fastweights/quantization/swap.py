"""`quantize_`: swap the linear layers of a model for quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

from fastweights.ops.quantization.functional import quantize
from fastweights.ops.quantization.layers import QuantizedEmbedding, QuantizedLinear
from fastweights.ops.quantization.tensor import QuantizedTensor

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
) -> Model:
    """Quantize every `nn.Linear` of a model in place, without calibration.

    Only modules whose type is exactly `nn.Linear` (and, with `embedding_format`, `nn.Embedding`)
    are swapped; a base layer inside an adapter is one of them. Float layers are freed one by one.

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

    Returns:
        The model.

    Raises:
        ValueError: unknown format or activation, or nothing to swap.
        RuntimeError: a weight that is not finite.
    """
    skipped = skip if callable(skip) else _by_name(tuple(skip))
    plan = _plan(model, skipped, embedding_format is not None)
    if not plan:
        raise ValueError(
            "quantize_: expected a model with nn.Linear layers that are not skipped, got none"
        )
    tables: dict[int, QuantizedTensor] = {}
    for names, table in plan:
        module = model.get_submodule(names[0])
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
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, swapped)
    return model


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
        table = id(module.weight) if id(module.weight) in tables else None
        if embeddings if table is not None else not skipped(name, module):
            names.setdefault(id(module), []).append(name)
            table_of[id(module)] = table
    return [(names[key], table_of[key]) for key in names]


def _by_name(names: tuple[str, ...]) -> Callable[[str, nn.Module], bool]:
    def skipped(name: str, module: nn.Module) -> bool:
        return any(name == n or name.endswith("." + n) for n in names)

    return skipped
