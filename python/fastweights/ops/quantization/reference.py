"""Quantized weights in plain torch: the definition that the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from fastweights.ops.quantization.tensor import FORMATS, LINE, STRIP, QuantizedTensor

__all__ = [
    "dequantize",
    "dequantize_rows",
    "quantize",
    "quantized_linear",
    "unpack",
]

CODES = {"int4": (0.0, 15.0), "int8": (-127.0, 127.0)}
SEARCH = {"int4": (7, 2), "int8": (1, 0)}  # shrunk ranges tried, least-squares refinements of each
BLOCK = 32


def quantize(
    w: Tensor, format: str, *, group_size: int | None = None, activation: str = "float"
) -> QuantizedTensor:
    """Same contract as `fastweights.quantize`."""
    group_size = 64 if group_size is None else group_size
    groups = _pad(w.float(), 1, group_size).unflatten(1, (-1, group_size))  # [N, G, g]
    inside = _pad(torch.ones_like(w, dtype=torch.float32), 1, group_size).unflatten(
        1, (-1, group_size)
    )
    scale, minimum = _fit(groups, inside, format)
    codes = _nearest(groups, scale, minimum, format) * inside
    return pack(codes, scale, minimum, format, (w.shape[0], w.shape[1]), activation)


def dequantize(qt: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Same contract as `fastweights.dequantize`: ``W = scale * code + minimum``."""
    codes, scale, minimum = unpack(qt)
    return (scale * codes + minimum).flatten(1)[:, : qt.shape[1]].to(dtype)


def quantized_linear(x: Tensor, qt: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """Same contract as `fastweights.quantized_linear`: ``x W^T + bias``."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    row = x.to(exact)
    if qt.activation == "int8":
        row = row + (quantize_activations(row.detach()) - row.detach())  # straight-through
    y = row @ dequantize(qt, exact).T
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def dequantize_rows(
    qt: QuantizedTensor, index: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Same contract as `fastweights.functional.dequantize_rows`."""
    rows: Tensor = dequantize(qt, dtype)[index]
    return rows


def quantize_activations(x: Tensor) -> Tensor:
    """Every 32 inputs of a row rounded to multiples of their largest magnitude / 127."""
    blocks = _pad(x.float(), -1, BLOCK).unflatten(-1, (-1, BLOCK))
    absmax = blocks.abs().amax(-1, keepdim=True)
    # Two tensors: torch divides a number by a tensor in two roundings.
    inverse = torch.where(absmax > 1e-36, torch.full_like(absmax, 127) / absmax, 0.0)
    rounded: Tensor = (blocks * inverse).round() * (absmax / 127.0)
    return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def _fit(w: Tensor, inside: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Scale and minimum ``[N, G, 1]`` of least squared error found by the search."""
    lowest, highest = CODES[format]
    shrinks, refinements = SEARCH[format]
    low = w.masked_fill(inside == 0, torch.inf).amin(-1, keepdim=True)
    high = w.masked_fill(inside == 0, -torch.inf).amax(-1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in range(shrinks):
        scale = (high - low) / ((highest - lowest) * (1 + shrink / 18))
        minimum = (low + high - scale * (lowest + highest)) / 2 if shrink else low - scale * lowest
        for _ in range(refinements + 1):
            s, m = scale.half().float(), minimum.half().float()
            codes = _nearest(w, s, m, format)
            error = ((w - (s * codes + m)) * inside).square().sum(-1, keepdim=True)
            if best is None:
                best = error, s, m
            else:
                better = error < best[0]
                tried = (error, s, m)
                best = tuple(  # type: ignore[assignment]
                    torch.where(better, a, b) for a, b in zip(tried, best, strict=True)
                )
            scale, minimum = _least_squares(w, codes, inside)
    assert best is not None
    return best[1], best[2]


def _least_squares(w: Tensor, codes: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The (scale, minimum) that minimise the sum of ``(w - scale code - minimum)^2``."""

    def total(t: Tensor) -> Tensor:
        return (t * inside).sum(-1, keepdim=True)

    n, c, cc = total(torch.ones_like(w)), total(codes), total(codes * codes)
    determinant = n * cc - c * c
    scale = torch.where(determinant > 0, (n * total(w * codes) - c * total(w)) / determinant, 0.0)
    return scale, (total(w) - scale * c) / n


def _nearest(w: Tensor, scale: Tensor, minimum: Tensor, format: str) -> Tensor:
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return ((w - minimum) * inverse).clamp(*CODES[format]).round()


def pack(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    format: str,
    shape: tuple[int, int],
    activation: str,
) -> QuantizedTensor:
    """Codes ``[N, G, g]``, scale and minimum ``[N, G, 1]`` in the layout of the kernels."""
    group_size = codes.shape[2]
    codes, scale, minimum = (
        _pad(t, 0, STRIP).unflatten(0, (-1, STRIP)) for t in (codes, scale, minimum)
    )
    if format == "int4":  # [S, 16, G, lines, high or low nibble, 4]
        nibbles = codes.to(torch.uint8).unflatten(3, (-1, 2, 4))
        words = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)
    else:
        words = codes.to(torch.int8).view(torch.uint8).unflatten(3, (-1, 4))
    lines = words.permute(0, 2, 3, 1, 4).flatten(2)  # [S, G, lines * 64]
    parameters = torch.stack([scale, minimum], 3).to(torch.float16)[..., 0].permute(0, 2, 3, 1)
    stored = torch.cat([lines, parameters.contiguous().view(torch.uint8).flatten(2)], 2)
    return QuantizedTensor(stored.flatten(1).contiguous(), format, shape, group_size, activation)


def unpack(qt: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, G, g]``, scale and minimum ``[N, G, 1]``, all float32."""
    n, k = qt.shape
    groups = -(-k // qt.group_size)
    strips = qt.packed.shape[0]
    lines = qt.group_size * FORMATS[qt.format] // 32
    stored = qt.packed.reshape(strips, groups, lines + 1, STRIP, 4)
    words = stored[:, :, :-1].permute(0, 3, 1, 2, 4)  # [S, 16, G, lines, 4]
    if qt.format == "int4":
        codes = torch.stack([words & 15, words >> 4], 4).flatten(3)
    else:
        codes = words.contiguous().view(torch.int8).flatten(3)
    parameters = stored[:, :, -1].reshape(strips, groups, LINE).view(torch.float16)
    scale, minimum = parameters.unflatten(2, (2, STRIP)).permute(2, 0, 3, 1).float().unbind(0)
    return (
        codes.float().flatten(0, 1)[:n],
        scale.flatten(0, 1)[:n, :, None],
        minimum.flatten(0, 1)[:n, :, None],
    )


def _pad(t: Tensor, dim: int, multiple: int) -> Tensor:
    missing = -t.shape[dim] % multiple
    shape = list(t.shape)
    shape[dim] = missing
    return torch.cat([t, t.new_zeros(shape)], dim) if missing else t
