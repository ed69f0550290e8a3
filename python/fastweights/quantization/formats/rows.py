"""Packed weights made and taken apart a few strips at a time: little is needed beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastweights.ops.quantization.formats import STRIP
from fastweights.ops.quantization.layout import pack_stored
from fastweights.ops.quantization.tensor import QuantizedTensor, packed_shape

__all__ = ["pack_rows", "row_parts", "rows_of"]

_MOST_AT_ONCE = 1 << 22  # weights of a part


def row_parts(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole strips, of a bounded number of weights each."""
    step = max(1, _MOST_AT_ONCE // (STRIP * max(columns, 1))) * STRIP
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def pack_rows(
    format: str,
    shape: tuple[int, int],
    group_size: int,
    activation: str,
    part: Callable[[int, int], tuple[Tensor, Sequence[Tensor]]],
) -> QuantizedTensor:
    """The packed weight of `part(start, stop)`, codes ``[R, G, g]`` and parameters ``[R, G]``.

    What the parameters are is the format's, see `fastweights.ops.quantization.layout.pack_stored`.
    """
    n, k = shape
    packed = torch.empty(packed_shape(format, n, k, group_size), dtype=torch.uint8)
    for start, stop in row_parts(n, k):
        strips = pack_stored(*part(start, stop), format, (stop - start, k), activation)
        packed[start // STRIP : -(-stop // STRIP)] = strips.packed
    return QuantizedTensor(packed, format, shape, group_size, activation)


def rows_of(weight: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Outputs start to stop, `start` the first of a strip; they share memory with the whole."""
    strips = weight.packed[start // STRIP : -(-stop // STRIP)]
    shape = (stop - start, weight.shape[1])
    return QuantizedTensor(strips, weight.format, shape, weight.group_size, weight.activation)
