"""Codes with a scale and a zero point per group, as most checkpoints have them: packed and back.

``W = scale * (code - zero)``, which the packed formats with zero points hold as it is: in float16
where that is exact, else in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.layout import unpack_codes, unpack_stored
from fastweights.quantization.formats.check import Tensors
from fastweights.quantization.formats.layer import Layer
from fastweights.quantization.formats.rows import pack_rows, rows_of

__all__ = [
    "Affine", "from_layer", "group_count", "group_width", "input_groups", "input_order",
    "require_middle_zeros", "to_layer",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Affine:
    """A weight ``[N, K]`` as a file has it: ``scale * (code - zero)``.

    Args:
        shape: ``(N, K)``.
        bits: per code.
        group_size: inputs per scale; -1 for all of them.
        codes: `codes(start, stop)` are those of outputs start to stop, uint8 ``[stop - start, K]``
            in the order of the inputs of the layer.
        scale: ``[N, G]``, finite.
        zero: ``[N, G]``, finite.
        order: see `Layer`.
        bias: ``[N]`` or None.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    codes: Callable[[int, int], Tensor]
    scale: Tensor
    zero: Tensor
    order: Tensor | None = None
    bias: Tensor | None = None


def group_width(format: str, bits: int, group_size: int, inputs: int) -> int:
    """Inputs per group of the packed weight: `group_size`, or all of them for -1.

    Raises:
        ValueError: a group size that the packed weight does not have.
    """
    width = -(-inputs // 32) * 32 if group_size == -1 else group_size
    packed = FORMATS[f"{_integers(bits)}_zp"]
    if not packed.accepts(width):
        fewer = ", or 16," if packed.small_group else ""
        raise ValueError(
            f"{format}: group_size: expected -1, a multiple of 32{fewer} up to 65536 for {bits} "
            f"bits, got {group_size} for {inputs} inputs"
        )
    return width


def group_count(format: str, bits: int, group_size: int, inputs: int) -> int:
    """Groups of the inputs of one output."""
    return -(-inputs // group_width(format, bits, group_size, inputs))


def input_order(tensors: Tensors, name: str, g_idx: Tensor, group_size: int) -> Tensor | None:
    """Inputs sorted by their groups; None if they are already.

    Args:
        tensors: for the message.
        name: for the message.
        g_idx: int32 ``[K]``, group of each input.
        group_size: inputs per group, at most the last having fewer.
    """
    inputs = len(g_idx)
    groups = -(-inputs // group_size)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise tensors.error(name, f"groups from 0 to {groups - 1}", f"{low} to {high}")
    regular = torch.arange(inputs) // group_size
    if torch.equal(g_idx.long(), regular):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), regular):
        counts = g_idx.bincount(minlength=groups)
        wrong = int((counts != regular.bincount(minlength=groups)).nonzero()[0])
        raise tensors.error(
            name, f"{group_size} inputs in every group", f"{int(counts[wrong])} in group {wrong}"
        )
    return order


def input_groups(format: str, source: Affine) -> Tensor:
    """The g_idx of a file: int32 ``[K]``, group of each input."""
    inputs = source.shape[1]
    width = group_width(format, source.bits, source.group_size, inputs)
    groups = torch.arange(inputs, dtype=torch.int32) // width
    return groups if source.order is None else groups[source.order.argsort()]


def to_layer(tensors: Tensors, source: Affine, activation: str) -> Layer:
    """The packed layer.

    Args:
        tensors: for messages.
        source: what the file says.
        activation: see `fastweights.quantize`.

    Raises:
        ValueError: weights that are not finite.
    """
    n, k = source.shape
    width = group_width(tensors.format, source.bits, source.group_size, k)
    offset = _offset(source.bits)
    scale, zero = source.scale.float(), source.zero.float()
    parameters = [scale, zero - offset]
    for code in (0, (1 << source.bits) - 1):
        # Kernels add scale * code to -scale * zero, and not every one in a single rounding.
        for level in (code - zero, torch.tensor(code - offset), zero - offset):
            if not bool((scale * level).isfinite().all()):
                raise tensors.error("weight", "scale * (code - zero) to be finite", "a larger one")
    exact = all(torch.equal(p.half().float(), p) for p in parameters)

    def part(start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        codes = source.codes(start, stop)
        if source.order is not None:
            codes = codes[:, source.order]
        groups = pad(codes - offset, (0, -k % width)).unflatten(1, (-1, width))
        return groups, [p[start:stop] for p in parameters]

    format = f"{_integers(source.bits)}_zp{'' if exact else '32'}"
    weight = pack_rows(format, (n, k), width, activation, part)
    return Layer(weight, source.bias, source.order, source.scale.dtype)


def from_layer(
    format: str, layer: Layer, bits: int, group_size: int, *, integers: bool = True
) -> Affine:
    """The layer as codes of `bits`, scale and zero point.

    Args:
        format: for messages.
        layer: see `Layer`.
        bits: per code in the file to be written.
        group_size: of the file to be written; must be the layer's.
        integers: zero points are codes; else any numbers.

    Raises:
        ValueError: the layer has codes, groups, scales or zero points that the file cannot have.
    """
    weight = layer.weight
    n, k = weight.shape
    kind, _, parameters = weight.format.partition("_")
    if not kind.startswith("int") or parameters not in ("zp", "zp32", "sym"):
        raise ValueError(
            f"{format}: expected a weight with zero points (int4_zp and the like) or a symmetric "
            f"one (int4_sym, int8_sym), got {weight.format}"
        )
    width = group_width(format, bits, group_size, k)
    if weight.group_size != width:
        raise ValueError(f"{format}: expected group_size {width}, got {weight.group_size}")
    offset = _offset(bits) if kind == "int8" else 0
    scale, *rest = unpack_stored(weight)
    zero = (rest[0] if rest else torch.full_like(scale, 8 if kind == "int4" else 0)) + offset
    wrong = (zero < 0) | (zero >= 1 << bits) | (zero != zero.round())
    if integers and bool(wrong.any()):
        raise ValueError(
            f"{format}: expected integer zero points from 0 to {(1 << bits) - 1}, "
            f"got {float(zero[wrong][0]):g}"
        )
    stored = scale.to(layer.scale_dtype)
    if not torch.equal(stored.float(), scale):
        raise ValueError(f"{format}: expected scales that {layer.scale_dtype} holds, got others")
    back = None if layer.order is None else layer.order.argsort()

    def codes(start: int, stop: int) -> Tensor:
        part = unpack_codes(rows_of(weight, start, stop)).flatten(1)[:, :k] + offset
        if FORMATS[weight.format].bits > bits and bool((part >> bits).any()):
            raise ValueError(f"{format}: expected codes of {bits} bits, got {int(part.max())}")
        return part if back is None else part[:, back]

    return Affine((n, k), bits, group_size, codes, stored, zero, layer.order, layer.bias)


def require_middle_zeros(format: str, source: Affine) -> None:
    """Raises unless the weight is one for a file without zero points: all are ``2**(bits - 1)``."""
    middle = 1 << (source.bits - 1)
    wrong = source.zero != middle
    if bool(wrong.any()):
        raise ValueError(
            f"{format}: expected a symmetric weight, zero points of {middle}, "
            f"got {float(source.zero[wrong][0]):g}"
        )


def _integers(bits: int) -> str:
    """The packed integers that hold codes of `bits`."""
    return f"int{max(bits, 2)}" if bits <= 6 else "int8"


def _offset(bits: int) -> int:
    """What is subtracted from codes, for signed integers to hold them."""
    return 128 if bits == 8 else 0
