"""Which layers of a saved model are quantized, as data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.layers import QuantizedEmbedding, QuantizedLinear
from fastweights.ops.quantization.tensor import ACTIVATIONS, QuantizedTensor, packed_shape

_SETTINGS = ("format", "group_size", "activation")


def describe_quantized(model: nn.Module) -> list[dict[str, Any]]:
    """One entry for every setting: format, group size, activation and the modules that have it.

    A module is a list of names: several where modules share one packed tensor. "ordered" is there
    where the modules have an order of their inputs.
    """
    entries: dict[tuple[Any, ...], dict[int, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            ordered = getattr(module, "order", None) is not None
            setting = (*(getattr(module, key) for key in _SETTINGS), ordered)
            entries.setdefault(setting, {}).setdefault(module.packed.data_ptr(), []).append(name)
    return [
        dict(zip(_SETTINGS, setting, strict=True))
        | ({"ordered": True} if ordered else {})
        | {"modules": list(names.values())}
        for (*setting, ordered), names in entries.items()
    ]


def prepare_quantized(model: nn.Module, description: Any) -> set[str]:
    """Puts empty quantized layers where `description` says, for their tensors to be loaded into.

    Returns:
        State-dict names that share the tensor of another name.

    Raises:
        ValueError: the description is damaged.
    """
    aliases: set[str] = set()
    try:
        for entry in description:
            settings = [entry[key] for key in _SETTINGS]
            form, group_size, activation = settings
            ordered = entry.get("ordered", False)
            known = form in FORMATS and activation in ACTIVATIONS and type(group_size) is int
            known = known and type(ordered) is bool
            if not known or not FORMATS[form].accepts(group_size):
                raise ValueError(f"unknown settings {settings}")
            for names in entry["modules"]:
                _replace(model, names, form, group_size, activation, ordered)
                parts = ("packed", "order") if ordered else ("packed",)
                aliases.update(f"{name}.{part}" for name in names[1:] for part in parts)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"load: the entry quantized of config.json is damaged: {error}") from error
    return aliases


def _replace(
    model: nn.Module, names: list[str], form: str, group_size: int, activation: str, ordered: bool
) -> None:
    shared: QuantizedTensor | None = None
    order: Tensor | None = None
    for name in names:
        module: Any = model.get_submodule(name)
        if type(module) not in (nn.Linear, nn.Embedding):
            raise ValueError(f"{name} is no linear layer or embedding of this model")
        shape = (int(module.weight.shape[0]), int(module.weight.shape[1]))
        if shared is None:
            packed = torch.zeros(packed_shape(form, *shape, group_size), dtype=torch.uint8)
            shared = QuantizedTensor(packed, form, shape, group_size, activation)
            order = torch.arange(shape[1]) if ordered else None
        elif shared.shape != shape:
            raise ValueError(f"{name} has another shape than {names[0]}")
        parent, _, child = name.rpartition(".")
        layer = (
            QuantizedEmbedding(shared, module.weight.dtype)
            if isinstance(module, nn.Embedding)
            else QuantizedLinear(shared, module.bias, order)
        )
        setattr(model.get_submodule(parent), child, layer)
