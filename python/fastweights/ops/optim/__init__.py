"""Optimizer steps on many tensors at once, with states of 8 or 32 bits."""

from fastweights.ops.optim.functional import (
    dequantize_blockwise,
    dynamic_map,
    optimizer_step,
    quantize_blockwise,
)

__all__ = ["dequantize_blockwise", "dynamic_map", "optimizer_step", "quantize_blockwise"]
