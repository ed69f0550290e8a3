"""A linear layer of a checkpoint, whatever format it came in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastweights.ops.quantization.functional import dequantize
from fastweights.ops.quantization.layers import QuantizedLinear
from fastweights.ops.quantization.tensor import QuantizedTensor

__all__ = ["Layer"]


@dataclass(frozen=True, eq=False)
class Layer:
    """What a format's `read` gives and its `write` takes.

    Beside the packed weight it keeps what the file has and the weight cannot give back, so that
    writing the layer in the format that it came in gives the same bytes.

    Args:
        weight: ``[N, K]``, its inputs in the order in which their groups are stored.
        bits: per code in the file; "int4" holds fewer than 4 bits too, "int8" 5 to 7.
        bias: ``[N]`` or None.
        order: int64 ``[K]``, a permutation: column j of `weight` meets input ``order[j]``. None: as
            they come. Groups of GPTQ's act-order are not contiguous in the file; sorted by group
            they are.
        scale_dtype: of the scales in the file.
        scale: ``[N, G]`` as in the file, where float16 does not hold them; else None.
        zero: ``[N, G]`` as in the file, where scale and minimum do not give them back; else None.
        error: bound of the change of any weight by float16 scales and minima, in steps of its
            group; 0 if the packed weight is exact.
    """

    weight: QuantizedTensor
    bits: int = 4
    bias: Tensor | None = None
    order: Tensor | None = None
    scale_dtype: torch.dtype = torch.float16
    scale: Tensor | None = None
    zero: Tensor | None = None
    error: float = 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[N, K]``, its inputs in the order of the layer's."""
        w = dequantize(self.weight, dtype)
        return w if self.order is None else w[:, self.order.argsort()]

    def module(self) -> QuantizedLinear:
        """The layer as a module; it shares memory with this."""
        return QuantizedLinear(self.weight, self.bias, self.order)
