"""Adapters into weights, and out of them again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from fastweights.adapters.activate import check_names
from fastweights.adapters.protocol import AdapterLayer, adapter_layers
from fastweights.adapters.rounding import ROUNDINGS
from fastweights.adapters.rules import paths
from fastweights.quantization.walk import set_module

__all__ = ["merge", "unmerge"]

Model = TypeVar("Model", bound=nn.Module)


def merge(
    model: Model,
    names: str | Sequence[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    keep_base: bool = False,
    quantized: bool = False,
    rounding: str = "nearest",
) -> Model:
    """Adds adapters to the weights that they adapt, in place, with one rounding.

    W + Σ s B A is computed a few rows at a time, in float32 over bfloat16 and float16 and else in
    float64. What the weight's dtype cannot hold of a small update is lost all the same:
    `fastweights.adapters.merge_report` tells how much.

    Args:
        model: with adapters.
        names: what to merge; None: the active ones.
        dtype: what the whole model becomes, and the merged weights without a detour; None leaves
            every layer its own.
        keep_base: False: adapted layers become plain ones, and all adapters are gone, those that
            were not merged with them. True: the layers stay and keep the base aside, so that
            `unmerge` restores every bit; merged layers then take twice the memory.
        quantized: allow layers with quantized weights: they are rounded again, in their format.
        rounding: "nearest"; or "stochastic": of bfloat16 and float16 weights, up or down by chance,
            so that a small update is there on average instead of not at all.

    Returns:
        The model.

    Raises:
        ValueError: there is nothing to merge, an adapter is merged already or not finite, or a
            layer is quantized and `quantized` does not allow it. Nothing is changed then.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import LoRA, merge
        >>> model = fw.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoRA(init="random"))
        >>> merge(model)
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"merge: expected rounding in {ROUNDINGS}, got {rounding!r}")
    layers = [(path, m) for path, m in paths(model) if isinstance(m, AdapterLayer)]
    if names is None:
        chosen = tuple(dict.fromkeys(name for _, layer in layers for name in layer.active))
    else:
        chosen = (names,) if isinstance(names, str) else tuple(names)
    if not chosen:
        raise ValueError("merge: expected a model with active adapters, got none")
    check_names("merge", model, chosen)
    for path, layer in layers:
        if layer.merged:
            raise ValueError(f"merge: expected {path} to be unmerged first, got {layer.merged}")
        layer.check_merge(chosen, quantized)
    if keep_base:
        for layer in dict.fromkeys(layer for _, layer in layers):
            if any(name in layer.configs for name in chosen):
                layer.merge(chosen, dtype, rounding)
    else:
        _warn_of_ties(model, layers)
        plain: dict[AdapterLayer, nn.Module] = {}
        for path, layer in layers:
            if layer not in plain:
                here = dtype is not None or any(name in layer.configs for name in chosen)
                plain[layer] = (
                    layer.merged_layer(chosen, dtype, rounding) if here else layer.original()
                )
            set_module(model, path, plain[layer])
    return model if dtype is None else model.to(dtype)


def unmerge(model: Model) -> Model:
    """Undoes ``merge(..., keep_base=True)``, bit for bit.

    Raises:
        ValueError: nothing is merged.
    """
    merged = [layer for layer in adapter_layers(model) if layer.merged]
    if not merged:
        raise ValueError("unmerge: expected adapters merged with keep_base=True, got none")
    for layer in merged:
        layer.unmerge()
    return model


def _warn_of_ties(model: nn.Module, layers: list[tuple[str, AdapterLayer]]) -> None:
    """A merged layer has a weight of its own; what shared it before keeps the old one."""
    adapted = {id(m) for _, layer in layers for m in layer.modules()}
    others = {
        id(p): path
        for path, module in model.named_modules()
        if id(module) not in adapted
        for p in module.parameters(recurse=False)
    }
    for path, layer in layers:
        other = others.get(id(layer.weight))
        if other is not None:
            warnings.warn(
                f"merge: {path} no longer shares its weight with {other}; save the model as one "
                "without tied weights",
                stacklevel=3,
            )
