"""A linear layer of a checkpoint, whatever format it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
        bias: ``[N]`` or None.
        order: int64 ``[K]``, a permutation: column j of `weight` meets input ``order[j]``. None: as
            they come. Groups of GPTQ's act-order are not contiguous in the file; sorted by group
            they are.
        scale_dtype: of the scales in the file.
        kept: tensors of the file, by their names there, that the weight was computed from and that
            cannot be computed from it.
    """

    weight: QuantizedTensor
    bias: Tensor | None = None
    order: Tensor | None = None
    scale_dtype: torch.dtype = torch.float16
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[N, K]``, its inputs in the order of the layer's."""
        w = dequantize(self.weight, dtype)
        return w if self.order is None else w[:, self.order.argsort()]

    def module(self) -> QuantizedLinear:
        """The layer as a module; it shares memory with this."""
        return QuantizedLinear(self.weight, self.bias, self.order)
