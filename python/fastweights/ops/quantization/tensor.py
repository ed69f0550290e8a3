"""The quantized weight: one tensor of packed bytes and what it takes to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastweights.ops.quantization.formats import FORMATS, STRIP

__all__ = ["ACTIVATIONS", "STRIP", "QuantizedTensor", "packed_shape"]

ACTIVATIONS = ("float", "int8")


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight ``[N, K]`` as codes with one scale, and perhaps one minimum, per group of inputs.

    ``W[n, k] = scale[n, k // group_size] * level(code[n, k]) + minimum[n, k // group_size]``; the
    levels are the format's, see `fastweights.quantize`, which makes these. It is a pytree whose
    only leaf is ``packed``, so it passes through ``torch.compile``, ``torch.export``,
    ``checkpoint`` and ``tree_map``.

    Args:
        packed: uint8 ``[ceil(N / 16), bytes per strip]``, the layout of the kernels
            (docs/quantization.md); opaque, portable between CPU levels, safe to save.
        format: see `fastweights.quantize`.
        shape: ``(N, K)``.
        group_size: inputs per scale.
        activation: what `fastweights.quantized_linear` does with its input: "float" leaves it,
            "int8" quantizes each row of it per 32 inputs. A property of the weight, so that
            numerics never depend on grad mode or on the caller.
    """

    packed: Tensor
    format: str
    shape: tuple[int, int]
    group_size: int
    activation: str

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales, minima and padding included."""
        return 8 * self.packed.numel() / max(self.shape[0] * self.shape[1], 1)

    def __repr__(self) -> str:
        n, k = self.shape
        return (
            f"QuantizedTensor([{n}, {k}], {self.format!r}, group_size={self.group_size}, "
            f"activation={self.activation!r})"
        )


def packed_shape(
    format: str, out_features: int, in_features: int, group_size: int
) -> tuple[int, int]:
    """Shape of ``QuantizedTensor.packed``: (strips of 16 outputs, bytes per strip)."""
    form = FORMATS[format]
    groups = -(-in_features // group_size)
    bundles = -(-groups // form.bundle)
    return -(-out_features // STRIP), bundles * form.bundle_bytes(group_size)


def _flatten(qt: QuantizedTensor) -> tuple[list[Tensor], tuple[Any, ...]]:
    return [qt.packed], (qt.format, tuple(qt.shape), qt.group_size, qt.activation)


def _flatten_with_keys(
    qt: QuantizedTensor,
) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], tuple[Any, ...]]:
    children, context = _flatten(qt)
    return [(pytree.GetAttrKey("packed"), children[0])], context


def _unflatten(children: Any, context: Any) -> QuantizedTensor:
    (packed,) = children
    format, shape, group_size, activation = context
    return QuantizedTensor(packed, format, tuple(shape), group_size, activation)


def _dump(context: Any) -> Any:
    return list(context)


def _restore(context: Sequence[Any]) -> Any:
    format, shape, group_size, activation = context
    return format, tuple(shape), group_size, activation


pytree.register_pytree_node(
    QuantizedTensor,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="fastweights.QuantizedTensor",
    to_dumpable_context=_dump,
    from_dumpable_context=_restore,
)
torch.serialization.add_safe_globals([QuantizedTensor])
