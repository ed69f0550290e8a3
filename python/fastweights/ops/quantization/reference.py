"""Quantized weights in plain torch: the definition that the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from fastweights.ops.quantization.formats import FORMATS, Format
from fastweights.ops.quantization.layout import pack, unpack
from fastweights.ops.quantization.tensor import QuantizedTensor

__all__ = [
    "dequantize",
    "dequantize_rows",
    "quantize",
    "quantized_linear",
]

BLOCK = 32


def quantize(
    w: Tensor, format: str, *, group_size: int | None = None, activation: str = "float"
) -> QuantizedTensor:
    """Same contract as `fastweights.quantize`."""
    form = FORMATS[format]
    group_size = form.group_size if group_size is None else group_size
    groups = _pad(w.float(), 1, group_size).unflatten(1, (-1, group_size))  # [N, G, g]
    inside = _pad(torch.ones_like(w, dtype=torch.float32), 1, group_size)
    inside = inside.unflatten(1, (-1, group_size))
    if form.parameters == "float32":
        scale = groups.abs().amax(-1, keepdim=True)
        inverse, minimum = 1 / scale.clamp(min=1e-38), torch.zeros_like(scale)
    elif form.parameters == "e8m0":
        scale = _power_of_two(groups.abs().amax(-1, keepdim=True))
        inverse, minimum = 1 / scale, torch.zeros_like(scale)
    else:
        scale, minimum = _search(groups, inside, form)
        inverse = _inverse(scale)
    codes = nearest((groups - minimum) * inverse, form) * inside
    return pack(codes, scale, minimum, format, (w.shape[0], w.shape[1]), activation)


def dequantize(qt: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Same contract as `fastweights.dequantize`: ``W = scale * level(code) + minimum``."""
    return _decode(qt, FORMATS[qt.format].levels, 1.0, dtype)


def quantized_linear(x: Tensor, qt: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """Same contract as `fastweights.quantized_linear`: ``x W^T + bias``."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(exact) @ dequantize(qt, exact).T
    if qt.activation == "int8":
        form = FORMATS[qt.format]
        image = _decode(qt, form.image or form.levels, form.image_unit, exact)
        rounded = quantize_activations(x.detach().to(exact)) @ image.T
        y = y + (rounded - y).detach()  # straight-through
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def _decode(
    qt: QuantizedTensor, levels: tuple[float, ...], unit: float, dtype: torch.dtype
) -> Tensor:
    """``scale * unit * levels[code] + minimum`` ``[N, K]``, in float64 where dtype is."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    codes, scale, minimum = unpack(qt)
    table = torch.tensor(levels, dtype=torch.float32, device=codes.device).to(exact)
    w = scale.to(exact) * unit * table[codes.long()] + minimum.to(exact)
    return w.flatten(1)[:, : qt.shape[1]].to(dtype)


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


def nearest(x: Tensor, form: Format) -> Tensor:
    """Codes (uint8) of the levels nearest to x."""
    if form.is_grid:
        return form.encode(x.round().clamp(*form.extent))
    table = torch.tensor(form.levels, dtype=torch.float32, device=x.device)
    if form.parameters == "e8m0":  # E2M1 rounds to even
        step = (x.abs().clamp(min=1).frexp().exponent - 2.0).exp2()
        level = ((x / step).round() * step).clamp(*form.extent)
        return (level[..., None] == table).int().argmax(-1).to(torch.uint8)
    order = table.argsort(stable=True)
    middles = (table[order][:-1] + table[order][1:]) / 2
    return order[torch.bucketize(x.contiguous(), middles)].to(torch.uint8)


def _power_of_two(absmax: Tensor) -> Tensor:
    """What puts the largest magnitude into [4, 8), where E2M1 ends."""
    exponent = (absmax.frexp().exponent - 3).clamp(min=-127)
    exponent = torch.where(absmax == 0, -127, exponent)
    return torch.where(absmax.isfinite(), exponent.double().exp2().float(), torch.nan)


def _search(w: Tensor, inside: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Scale and minimum ``[N, G, 1]`` of least squared error found by the search."""
    ranges, refinements = (1, 0) if form.bits == 8 else (7, 2)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for i in range(ranges):
        scale, minimum = _first_guess(w, inside, form, i)
        for _ in range(refinements + 1):
            s, m = scale.half().float(), minimum.half().float()
            levels = _levels((w - m) * _inverse(s), form)
            error = ((w - (s * levels + m)) * inside).square().sum(-1, keepdim=True)
            if best is None:
                best = error, s, m
            else:
                better = error < best[0]
                tried = (error, s, m)
                best = tuple(  # type: ignore[assignment]
                    torch.where(better, a, b) for a, b in zip(tried, best, strict=True)
                )
            scale, minimum = _least_squares(w, levels, inside, form)
    assert best is not None
    return best[1], best[2]


def _first_guess(w: Tensor, inside: Tensor, form: Format, i: int) -> tuple[Tensor, Tensor]:
    """The i-th range to try: shrunk around its middle, or in turn wider and narrower."""
    low = w.masked_fill(inside == 0, torch.inf).amin(-1, keepdim=True)
    high = w.masked_fill(inside == 0, -torch.inf).amax(-1, keepdim=True)
    lowest, highest = form.extent
    if form.has_minimum:
        scale = (high - low) / ((highest - lowest) * (1 + i / 18))
        minimum = (low + high - scale * (lowest + highest)) / 2 if i else low - scale * lowest
        return scale, minimum
    extreme = highest if highest >= -lowest else lowest
    width = 1 + ((i + 1) // 2 if i % 2 else -i // 2) / 18
    return torch.where(-low >= high, low, high) * (width / extreme), torch.zeros_like(low)


def _least_squares(
    w: Tensor, levels: Tensor, inside: Tensor, form: Format
) -> tuple[Tensor, Tensor]:
    """The (scale, minimum) that minimise the sum of ``(w - scale level - minimum)^2``."""

    def total(t: Tensor) -> Tensor:
        return (t * inside).sum(-1, keepdim=True)

    n, c, cc = total(torch.ones_like(w)), total(levels), total(levels * levels)
    if not form.has_minimum:
        return torch.where(cc > 0, total(w * levels) / cc, 0.0), torch.zeros_like(cc)
    determinant = n * cc - c * c
    scale = torch.where(determinant > 0, (n * total(w * levels) - c * total(w)) / determinant, 0.0)
    return scale, (total(w) - scale * c) / n


def _levels(x: Tensor, form: Format) -> Tensor:
    table = torch.tensor(form.levels, dtype=torch.float32, device=x.device)
    return table[nearest(x, form).long()]


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _pad(t: Tensor, dim: int, multiple: int) -> Tensor:
    missing = -t.shape[dim] % multiple
    shape = list(t.shape)
    shape[dim] = missing
    return torch.cat([t, t.new_zeros(shape)], dim) if missing else t
