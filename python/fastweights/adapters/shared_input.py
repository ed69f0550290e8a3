"""Layers that read the same input, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastweights.adapters.lora_linear import LoRALinear
from fastweights.ops.lora.functional import lora_linear

__all__ = ["together"]

# The weights of some layers, stacked, by the first layer: with what they were stacked from. That is
# kept, so that its memory is not given to another weight, which would look the same.
_Stack = tuple[Any, list[Tensor], tuple[Tensor, Tensor | None]]
_stacks: WeakKeyDictionary[nn.Module, _Stack] = WeakKeyDictionary()


def together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """``[layer(x) for layer in layers]``, by one call of `lora_linear` where that can be.

    That is where all are `LoRALinear` over frozen `nn.Linear`s, with the same adapters in use and
    nothing but plain LoRA: no DoRA, no bias of its own, no dropout, no choice by sample. Their
    weights are stacked once, in the dtype that they are used in, and again when one has changed;
    the copy stays as long as the first layer does.

    Args:
        layers: what reads x, such as the projections to queries, keys and values.
        x: ``[..., in_features]``.

    Returns:
        One ``[..., out_features]`` for each layer.
    """
    adapted = [m for m in layers if isinstance(m, LoRALinear) and _is_plain(m)]
    names = adapted[0].used if adapted else ()
    if len(adapted) != len(layers) or any(layer.used != names for layer in adapted):
        return [layer(x) for layer in layers]
    stack = _stack(adapted)
    if stack is None:
        return [layer(x) for layer in layers]
    pairs = [(layer, name) for name in names for layer in adapted]
    sizes = [layer.out_features for layer in adapted]
    scale = torch.stack([layer.scale for layer in adapted], 1).flatten()
    y = lora_linear(
        x,
        *stack,
        [layer.lora_A[name] for layer, name in pairs],
        [layer.lora_B[name] for layer, name in pairs],
        scale,
        split=sizes,
    )
    return list(y.split(sizes, -1))


def _is_plain(layer: LoRALinear) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and layer.adds_only_updates()
        and not torch.compiler.is_compiling()
    )


def _stack(layers: Sequence[LoRALinear]) -> tuple[Tensor, Tensor | None] | None:
    """The layers' weights and biases under each other, if they can be."""
    bases = [cast(nn.Linear, layer.base_layer) for layer in layers]
    weights, biases = [base.weight for base in bases], [base.bias for base in bases]
    parts = [*weights, *(b for b in biases if b is not None)]
    alike = len({(p.dtype, p.device) for p in parts}) == 1 and len({b is None for b in biases}) == 1
    if not alike or any(p.requires_grad or p.is_inference() for p in parts):
        return None  # the weights are trained, or do not tell when they change
    dtype = weights[0].dtype
    if torch.is_autocast_enabled("cpu") and dtype == torch.float32:
        dtype = torch.get_autocast_dtype("cpu")
    origin = (dtype, *((p.data_ptr(), p._version) for p in parts))
    found = _stacks.get(layers[0])
    if found is None or found[0] != origin:
        with torch.no_grad():
            bias = None if biases[0] is None else torch.cat([b.to(dtype) for b in biases])
            weight = torch.cat([w.to(dtype) for w in weights])
        found = origin, [p.detach() for p in parts], (weight, bias)
        _stacks[layers[0]] = found
    return found[2]
