"""Weights of few bits: `quantize`, `dequantize`, `quantized_linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights.ops._common import needs_reference, refuse_double_backward, refuse_forward_ad
from fastweights.ops.quantization import reference
from fastweights.ops.quantization.formats import FORMATS, resolve
from fastweights.ops.quantization.tensor import ACTIVATIONS, QuantizedTensor, packed_shape

__all__ = [
    "dequantize",
    "dequantize_rows",
    "quantize",
    "quantized_linear",
]

_ops = torch.ops.fastweights


def quantize(
    w: Tensor, format: str, *, group_size: int | None = None, activation: str = "float"
) -> QuantizedTensor:
    """Round a weight to a format of few bits, without calibration.

    Every group of `group_size` inputs of every output gets a scale, in some formats a minimum; a
    weight is ``scale * level + minimum``. docs/quantization.md has their errors and how to choose.

    - "int2", "int3", "int4", "int5", "int6", "int8": levels from 0 (int8: -127 to 127), scale and
      minimum in float16, both searched: seven shrunk ranges, each refined by least squares for its
      levels, the one of least squared error kept ("int8": the plain range). A weight on such a grid
      already (GGUF Q4_1: "int4" at 32; Q5_0, Q5_1: "int5") is reproduced.
    - "int2_zp" to "int8_zp": scale and a zero point in float16, ``scale * (level - zero)``, by
      GPTQ's rule: the levels span the weights and 0. "int2_zp32" to "int8_zp32": both in float32.
    - "int4_sym", "int8_sym": levels -8..7 and -127..127 and no minimum, scale in float16 (GGUF Q4_0
      and Q8_0).
    - "q4_k", "q6_k": llama.cpp's super-blocks of 256 inputs, whose scales (and minima) per 32 and
      per 16 inputs are 6 and 8 bits and share a float16.
    - "q4_0", "q4_1", "q5_1", "q8_0": GGUF's names for "int4_sym", "int4", "int5" and "int8_sym"
      with group_size 32.
    - "nf4", "fp4": the code books of bitsandbytes, and its rounding; the scale is the largest
      magnitude, in float32.
    - "iq4_nl": llama.cpp's code book with a float16 scale, searched.
    - "mxfp4": the OCP microscaling format: E2M1 levels, a power of two per 32 inputs, as its
      standard says; halfway goes to the even mantissa.
    - "fp8_e4m3": 8-bit floats with a float32 scale, which takes the largest magnitude to 448.

    Args:
        w: ``[N, K]``, any N and K; float32, bfloat16, float16 or float64, finite, magnitudes
            within float16 where scales are.
        format: one of the above.
        group_size: inputs per scale, a multiple of 32, or 16 for integers of 2, 4, 6 or 8 bits that
            have a minimum or zero point. None means 32 for "int4_sym", "int8_sym" and
            "iq4_nl", else 64. "q4_k" and "mxfp4" have 32, "q6_k" has 16, and no other.
        activation: what `quantized_linear` will do with its input, see there. "float" is exact;
            "int8" is the fast one for many rows, which "fp8_e4m3" does not have.

    Returns:
        QuantizedTensor; it has no gradient to w.

    Raises:
        ValueError: unknown format or activation, or one that does not go with the other.
        RuntimeError: a w that is not a finite matrix, a group size that the format does not have.

    Example:
        >>> import torch, fastweights as fw
        >>> qt = fw.quantize(torch.randn(48, 100), "int4", group_size=64)
        >>> y = fw.quantized_linear(torch.randn(3, 100), qt)
    """
    format, group_size = resolve(format, group_size)
    if activation not in ACTIVATIONS:
        raise ValueError(f"quantize: expected activation in {ACTIVATIONS}, got {activation!r}")
    if activation not in FORMATS[format].activations:
        raise ValueError(
            f"quantize: expected activation in {FORMATS[format].activations} for format "
            f"{format!r}, got {activation!r}"
        )
    w = w.detach()
    if needs_reference(w):
        return reference.quantize(w, format, group_size=group_size, activation=activation)
    packed = _ops.quantize(w, format, group_size)
    return QuantizedTensor(packed, format, (w.shape[0], w.shape[1]), group_size, activation)


def dequantize(qt: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[N, K]`` that the codes stand for.

    Args:
        qt: from `quantize`.
        dtype: of the result: float32, bfloat16, float16 or float64.

    Raises:
        RuntimeError: packed bytes of the wrong size, or with scales that are not finite.
    """
    if needs_reference(qt.packed):
        return reference.dequantize(qt, dtype)
    result: Tensor = _ops.dequantize(qt.packed, qt.format, *qt.shape, qt.group_size, dtype)
    return result


def dequantize_rows(
    qt: QuantizedTensor, index: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of the weight, as an embedding looks them up: ``dequantize(qt)[index]``.

    Args:
        qt: from `quantize`.
        index: int64 ``[...]``, in ``[0, N)``.
        dtype: of the result ``[..., K]``.

    Raises:
        RuntimeError: an index outside the weight.
    """
    if needs_reference(qt.packed, index):
        return reference.dequantize(qt, dtype)[index]
    result: Tensor = _ops.dequantize_rows(
        qt.packed, index, qt.format, *qt.shape, qt.group_size, dtype
    )
    return result


def quantized_linear(x: Tensor, qt: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + bias`` with a quantized weight that is never written out.

    With ``qt.activation == "float"`` x meets the exact ``scale * level + minimum`` in float32. With
    "int8" every 32 inputs of a row of x (16 for "q6_k") are first rounded to multiples of their
    largest magnitude / 127 (relative error about 0.4 %), and meet integers: "nf4" and "fp4" round
    their levels to multiples of 1/127 and 1/96 for it (0.03 dB), the other formats are exact.
    Either way a row's result is the same bits for any number of rows, and for any number of
    threads. The gradient to x is ``dy W`` (straight-through for "int8"); it decodes panels of the
    packed weight, which is all that is saved. On machines with AMX, bfloat16 x under "float" and
    bfloat16 gradients meet the weight rounded to bfloat16.

    Args:
        x: ``[..., K]``, float32, bfloat16, float16 or float64 (computed in float32; in float64 for
            float64 with activation "float").
        qt: weight ``[N, K]`` from `quantize`.
        bias: ``[N]``, any floating dtype.

    Returns:
        ``[..., N]`` in the dtype of x. An infinity or NaN in x makes its row NaN under "int8".

    Raises:
        RuntimeError: sizes that do not match.
        NotImplementedError: double backward or forward-mode differentiation.

    Cost: one pass over the packed weight for few rows (memory-bound), 2 M N K operations for many.
    """
    refuse_forward_ad("quantized_linear", x, bias)
    if needs_reference(x, qt.packed):
        return reference.quantized_linear(x, qt, bias)
    result: Tensor = _ops.quantized_linear(
        x, qt.packed, bias, qt.format, *qt.shape, qt.group_size, qt.activation
    )
    return result


def _quantize_fake(w: Tensor, format: str, group_size: int) -> Tensor:
    return w.new_empty(packed_shape(format, w.shape[0], w.shape[1], group_size), dtype=torch.uint8)


def _dequantize_fake(
    packed: Tensor, format: str, n: int, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty((n, k), dtype=dtype)


def _dequantize_rows_fake(
    packed: Tensor, index: Tensor, format: str, n: int, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty((*index.shape, k), dtype=dtype)


def _linear_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, format: str, n: int, *layout: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _linear_backward_fake(
    dy: Tensor, packed: Tensor, format: str, n: int, k: int, group_size: int
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], k))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, bias, *layout, _ = inputs
    ctx.save_for_backward(packed)
    ctx.layout = layout
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    dx = (
        _ops.quantized_linear_backward(dy, packed, *ctx.layout) if ctx.needs_input_grad[0] else None
    )
    db = dy.sum_to_size(dy.shape[-1:]).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dx, None, db, None, None, None, None, None


torch.library.register_fake("fastweights::quantize", _quantize_fake)
torch.library.register_fake("fastweights::dequantize", _dequantize_fake)
torch.library.register_fake("fastweights::dequantize_rows", _dequantize_rows_fake)
torch.library.register_fake("fastweights::quantized_linear", _linear_fake)
torch.library.register_fake("fastweights::quantized_linear_backward", _linear_backward_fake)
torch.library.register_autograd(
    "fastweights::quantized_linear", _backward, setup_context=_setup_context
)
refuse_double_backward("quantized_linear")


def _autocast(x: Tensor, *rest: Any) -> Tensor:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        x = x.to(torch.get_autocast_dtype("cpu")) if x.dtype == torch.float32 else x
        result: Tensor = _ops.quantized_linear(x, *rest)
        return result


torch.library.impl("fastweights::quantized_linear", "AutocastCPU", _autocast)
