"""Quantized weights in plain torch: the definition that the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from fastweights.ops.quantization.formats import FORMATS, Format
from fastweights.ops.quantization.layout import (
    pack,
    pack_stored,
    unpack,
    unpack_parameters,
    with_codes,
)
from fastweights.ops.quantization.tensor import QuantizedTensor

__all__ = [
    "dequantize",
    "dequantize_rows",
    "pack",
    "quantize",
    "quantized_linear",
    "unpack",
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
    parameters = _fit(groups, inside, form)
    shape = (w.shape[0], w.shape[1])
    grid = pack_stored(torch.zeros_like(groups), parameters, format, shape, activation)
    scale, minimum = unpack_parameters(grid)
    inverse = 1 / scale.clamp(min=1e-38) if form.parameters == "float32" else _inverse(scale)
    return with_codes(grid, nearest((groups - minimum) * inverse, form) * inside)


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
        row = quantize_activations(x.detach().to(exact), min(BLOCK, qt.group_size))
        rounded = row @ image.T
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


def quantize_activations(x: Tensor, block: int = BLOCK) -> Tensor:
    """Every 32 inputs of a row rounded to multiples of their largest magnitude / 127."""
    blocks = _pad(x.float(), -1, block).unflatten(-1, (-1, block))
    absmax = blocks.abs().amax(-1, keepdim=True)
    # Two tensors: torch divides a number by a tensor in two roundings.
    inverse = torch.where(absmax > 1e-36, torch.full_like(absmax, 127) / absmax, 0.0)
    rounded: Tensor = (blocks * inverse).round() * (absmax / 127.0)
    return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def nearest(x: Tensor, form: Format) -> Tensor:
    """Codes (uint8) of the levels nearest to x."""
    if form.is_grid:
        return form.encode(x.round().clamp(*form.extent))
    if form.bits == 8:  # E4M3
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    table = torch.tensor(form.levels, dtype=torch.float32, device=x.device)
    if form.parameters == "e8m0":  # E2M1 rounds to even
        step = (x.abs().clamp(min=1).frexp().exponent - 2.0).exp2()
        level = ((x / step).round() * step).clamp(*form.extent)
        return (level[..., None] == table).int().argmax(-1).to(torch.uint8)
    order = table.argsort(stable=True)
    middles = (table[order][:-1] + table[order][1:]) / 2
    return order[torch.bucketize(x.contiguous(), middles)].to(torch.uint8)


def _fit(w: Tensor, inside: Tensor, form: Format) -> tuple[Tensor, ...]:
    """What `pack_stored` wants, for weights ``[N, G, g]``."""
    absmax = w.abs().amax(-1)
    if form.has_zero:
        return _with_zero(w, inside, form)
    if form.parameters == "float32":  # the largest magnitude becomes the largest level
        return (absmax / (448.0 if form.bits == 8 else 1.0),)
    if form.parameters == "e8m0":  # the largest magnitude falls into [4, 8), where E2M1 ends
        exponent = (absmax.frexp().exponent - 3).clamp(min=-127)
        exponent = torch.where(absmax == 0, -127, exponent)
        return (torch.where(absmax.isfinite(), exponent.double().exp2().float(), torch.nan),)
    scale, minimum = (t[..., 0] for t in _search(w, inside, form))
    if form.parameters == "q4_k":
        (d, scales), (dmin, minima) = (_multiples(t, form, 63, 0, 63) for t in (scale, -minimum))
        return d, dmin, scales, minima
    if form.parameters == "q6_k":
        return _multiples(scale, form, -128, -128, 127)
    return (scale, minimum) if form.has_minimum else (scale,)


def _with_zero(w: Tensor, inside: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """GPTQ's scale and zero point ``[N, G]``: the levels span the weights and 0, one of them."""
    lowest, highest = form.extent
    low, high = (w * inside).amin(-1).clamp(max=0), (w * inside).amax(-1).clamp(min=0)
    scale = (high - low) / (highest - lowest)
    scale = scale.half().float() if form.parameters == "scale+zero" else scale
    return scale, lowest + (-low * _inverse(scale)).round()


def _multiples(v: Tensor, form: Format, top: int, least: int, most: int) -> tuple[Tensor, Tensor]:
    """``(d, n)`` with ``v = d n``: n is `top` for the number of a bundle that is largest."""
    bundles = _pad(v, 1, form.bundle).unflatten(1, (-1, form.bundle))
    largest = bundles.gather(2, bundles.abs().argmax(2, keepdim=True))
    d = (largest / top).half().float().expand_as(bundles).flatten(1)[:, : v.shape[1]]
    return d, (v * _inverse(d)).round().clamp(least, most).to(torch.int8)


def _search(w: Tensor, inside: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Scale and minimum ``[N, G, 1]`` of least squared error found by the search."""
    ranges, refinements = (1, 0) if form.bits == 8 else (7, 2)
    importance = inside * _importance(w, inside) if _keeps_zero(form) else inside
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for i in range(ranges):
        scale, minimum = _first_guess(w, inside, form, i)
        zero = None
        if _keeps_zero(form):
            zero = (-minimum * _inverse(scale)).round().clamp(*form.extent)
        for _ in range(refinements + 1):
            s, m = _storable(scale, minimum, zero, form)
            levels = _levels((w - m) * _inverse(s), form)
            error = ((w - (s * levels + m)).square() * importance).sum(-1, keepdim=True)
            if best is None:
                best = error, s, m
            else:
                better = error < best[0]
                tried = (error, s, m)
                best = tuple(  # type: ignore[assignment]
                    torch.where(better, a, b) for a, b in zip(tried, best, strict=True)
                )
            if zero is None:
                scale, minimum = _least_squares(w, levels, inside, form)
            else:
                scale = _projection(w, levels - zero, importance)
    assert best is not None
    return best[1], best[2]


def _keeps_zero(form: Format) -> bool:
    """With 2 and 3 bits the steps are wide: 0 is a level, so that what is small stays small."""
    return form.has_minimum and form.parameters != "q4_k" and form.bits <= 3


def _importance(w: Tensor, inside: Tensor) -> Tensor:
    """``rms + |w|``, the weight of a weight's error where 0 is kept a level."""
    mean_square = (w.square() * inside).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)
    return mean_square.sqrt() + w.abs()


def _storable(
    scale: Tensor, minimum: Tensor, zero: Tensor | None, form: Format
) -> tuple[Tensor, Tensor]:
    """As far as a group decides alone: bundles are rounded together, later."""
    if form.parameters == "q4_k":
        return scale, minimum.clamp(max=0)
    if form.parameters == "q6_k":
        return scale, minimum
    scale = scale.half().float()
    return scale, (minimum if zero is None else 0 - scale * zero).half().float()


def _first_guess(w: Tensor, inside: Tensor, form: Format, i: int) -> tuple[Tensor, Tensor]:
    """The i-th range to try: shrunk around its middle, or in turn wider and narrower."""
    low = w.masked_fill(inside == 0, torch.inf).amin(-1, keepdim=True)
    high = w.masked_fill(inside == 0, -torch.inf).amax(-1, keepdim=True)
    lowest, highest = form.extent
    step = 1 / 9 if form.bits == 2 else 1 / 18 if form.bits <= 4 else 1 / 36
    if form.has_minimum:
        low = low.clamp(max=0) if form.parameters == "q4_k" or _keeps_zero(form) else low
        high = high.clamp(min=0) if _keeps_zero(form) else high
        scale = (high - low) / ((highest - lowest) * (1 + i * step))
        minimum = (low + high - scale * (lowest + highest)) / 2 if i else low - scale * lowest
        return scale, minimum
    extreme = highest if highest >= -lowest else lowest
    width = 1 + ((i + 1) // 2 if i % 2 else -i // 2) * step
    return torch.where(-low >= high, low, high) * (width / extreme), torch.zeros_like(low)


def _projection(w: Tensor, levels: Tensor, importance: Tensor) -> Tensor:
    """The scale that minimises the sum of ``importance (w - scale level)^2``."""
    cc = (importance * levels * levels).sum(-1, keepdim=True)
    return torch.where(cc > 0, (importance * w * levels).sum(-1, keepdim=True) / cc, 0.0)


def _least_squares(
    w: Tensor, levels: Tensor, inside: Tensor, form: Format
) -> tuple[Tensor, Tensor]:
    """The (scale, minimum) that minimise the sum of ``(w - scale level - minimum)^2``."""
    alone = _projection(w, levels, inside)
    if not form.has_minimum:
        return alone, torch.zeros_like(alone)

    def total(t: Tensor) -> Tensor:
        return (t * inside).sum(-1, keepdim=True)

    n, c, cc = total(torch.ones_like(w)), total(levels), total(levels * levels)
    determinant = n * cc - c * c
    scale = torch.where(determinant > 0, (n * total(w * levels) - c * total(w)) / determinant, 0.0)
    minimum = (total(w) - scale * c) / n
    if form.parameters == "q4_k":  # minima are not positive
        scale, minimum = torch.where(minimum <= 0, scale, alone), minimum.clamp(max=0)
    return scale, minimum


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
