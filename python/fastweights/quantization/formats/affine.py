"""Codes with a scale and a zero point per group, as most checkpoints have them: packed and back.

In the file ``W = scale * (code - zero)`` with unsigned codes; packed ``W = scale * code + minimum``
with both parameters in float16. A zero point of 0, 1, 2, 4, 8 (all symmetric files) gives an exact
minimum, any other one that is rounded by up to ``2**-11`` of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastweights.ops.quantization.layout import unpack, unpack_parameters
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.quantization.formats.check import Tensors
from fastweights.quantization.formats.layer import Layer
from fastweights.quantization.formats.rows import pack_rows, rows_of

__all__ = [
    "FLOATS", "Affine", "container", "from_layer", "group_count", "group_width", "input_groups",
    "input_order", "to_layer",
]  # fmt: skip

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_GROUP = 1 << 16
_LARGEST_SCALE = 65504.0
# What float16 may do to a weight: an eighth of its step, or, in groups of tiny scale, 2**-10 of the
# tensor's largest weight.
_STEP, _LARGEST = 1 / 8, 2**-10


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


def container(bits: int) -> tuple[str, int]:
    """Format of the packed weight that holds codes of `bits`, and what is subtracted from them."""
    return (f"int{max(bits, 2)}", 0) if bits <= 6 else ("int8", 1 << (bits - 1))


def group_width(format: str, group_size: int, inputs: int) -> int:
    """Inputs per group of the packed weight: `group_size`, or all of them for -1.

    Raises:
        ValueError: a group size that the packed weight does not have.
    """
    width = -(-inputs // 32) * 32 if group_size == -1 else group_size
    if width < 1 or width % 32 or width > _LARGEST_GROUP:
        raise ValueError(
            f"{format}: group_size: expected -1 or a multiple of 32 up to {_LARGEST_GROUP}, "
            f"got {group_size} for {inputs} inputs"
        )
    return width


def group_count(format: str, group_size: int, inputs: int) -> int:
    """Groups of the inputs of one output."""
    return -(-inputs // group_width(format, group_size, inputs))


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
    width = group_width(format, source.group_size, inputs)
    groups = torch.arange(inputs, dtype=torch.int32) // width
    return groups if source.order is None else groups[source.order.argsort()]


def to_layer(tensors: Tensors, source: Affine, activation: str) -> Layer:
    """The packed layer.

    Args:
        tensors: for messages.
        source: what the file says.
        activation: see `fastweights.quantize`.

    Raises:
        ValueError: float16 cannot hold the parameters.
    """
    n, k = source.shape
    form, offset = container(source.bits)
    width = group_width(tensors.format, source.group_size, k)
    exact_scale, zero = source.scale.double(), source.zero.double()
    scale = source.scale.half().double()
    minimum = (exact_scale * (offset - zero)).half().double()
    error = _check_rounding(tensors, source, exact_scale, zero, scale, minimum)

    def codes(start: int, stop: int) -> Tensor:
        part = source.codes(start, stop)
        if source.order is not None:
            part = part[:, source.order]
        if not offset:
            return part
        return part - offset  # in two's complement

    def part(start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        groups = pad(codes(start, stop), (0, -k % width)).unflatten(1, (-1, width))
        return groups, [scale[start:stop], minimum[start:stop]]

    weight = pack_rows(form, (n, k), width, activation, part)
    return Layer(
        weight=weight,
        bits=source.bits,
        bias=source.bias,
        order=source.order,
        scale_dtype=source.scale.dtype,
        scale=None if torch.equal(scale, exact_scale) else source.scale.clone(),
        zero=None if torch.equal(_zero(scale, minimum, offset), zero) else source.zero.clone(),
        error=error,
    )


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
        ValueError: the layer has codes, groups or minima that the file cannot have.
    """
    weight = layer.weight
    n, k = weight.shape
    form, offset = container(layer.bits)
    if weight.format != form:
        raise ValueError(f"{format}: expected a weight in {form}, got {weight.format}")
    width = group_width(format, group_size, k)
    if weight.group_size != width:
        raise ValueError(f"{format}: expected group_size {width}, got {weight.group_size}")
    scale, minimum = parameters(weight)
    zero = _zero(scale, minimum, offset) if layer.zero is None else layer.zero.double()
    exact = scale if layer.scale is None else layer.scale.double()
    if not torch.equal((exact * (offset - zero)).half().double(), minimum):
        raise ValueError(
            f"{format}: expected every minimum to be scale * (code of zero), as in a weight read "
            "from such a file; got others, which an integer zero point does not give"
        )
    wrong = (zero < 0) | (zero >= 1 << bits) | (zero != zero.round())
    if integers and bool(wrong.any()):
        raise ValueError(
            f"{format}: expected integer zero points from 0 to {(1 << bits) - 1}, "
            f"got {float(zero[wrong][0]):g}"
        )
    back = None if layer.order is None else layer.order.argsort()

    def codes(start: int, stop: int) -> Tensor:
        part = _codes(weight, start, stop)
        if offset:
            part = part + offset
        if layer.bits > bits and bool((part >> bits).any()):
            raise ValueError(f"{format}: expected codes of {bits} bits, got {int(part.max())}")
        return part if back is None else part[:, back]

    stored = scale.to(layer.scale_dtype) if layer.scale is None else layer.scale
    return Affine((n, k), bits, group_size, codes, stored, zero, layer.order, layer.bias)


def parameters(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum ``[N, G]``, float64."""
    scale, minimum = unpack_parameters(weight)
    return scale[..., 0].double(), minimum[..., 0].double()


def _codes(weight: QuantizedTensor, start: int, stop: int) -> Tensor:
    """Codes of outputs start to stop, `start` the first of a strip, uint8."""
    return unpack(rows_of(weight, start, stop))[0].flatten(1)[:, : weight.shape[1]]


def _zero(scale: Tensor, minimum: Tensor, offset: int) -> Tensor:
    """The integer zero point that a float16 minimum was rounded from; the middle for scale 0."""
    return offset - torch.where(scale == 0, 0.0, minimum / scale).round()


def _check_rounding(
    tensors: Tensors, source: Affine, exact: Tensor, zero: Tensor, scale: Tensor, minimum: Tensor
) -> float:
    """Bound of what float16 does to a weight, in steps; raises if that is too much."""
    if bool((scale.abs() > _LARGEST_SCALE).any()) or bool((minimum.abs() > _LARGEST_SCALE).any()):
        raise tensors.error(
            "weight", f"scales and scale * zero of at most {_LARGEST_SCALE:g}", "a larger one"
        )
    if exact.numel() == 0:
        return 0.0
    offset, highest = container(source.bits)[1], (1 << source.bits) - 1
    # Linear in the code: largest at one of its ends.
    changes = [
        (scale * (code - offset) + minimum - exact * (code - zero)).abs() for code in (0, highest)
    ]
    change = torch.maximum(*changes)
    step = exact.abs()
    allowed = torch.maximum(step * _STEP, (step * highest).max() * _LARGEST)
    if bool((change > allowed).any()):
        raise tensors.error(
            "weight", "scales that float16 holds", f"one of {float(step[change > allowed][0]):g}"
        )
    return float(torch.where(step == 0, 0.0, change / step).max())
