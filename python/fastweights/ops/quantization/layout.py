"""Where codes, scales and minima lie in a packed weight; csrc/quantization/kernel.h says it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastweights.ops.quantization.formats import FORMATS, STRIP, Format
from fastweights.ops.quantization.tensor import QuantizedTensor, packed_shape

__all__ = ["pack", "pack_stored", "unpack", "unpack_parameters", "with_codes"]


def pack(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    format: str,
    shape: tuple[int, int],
    activation: str,
) -> QuantizedTensor:
    """A weight in the layout of the kernels, where groups store a scale or a scale and a minimum.

    Args:
        codes: ``[N, G, g]``, integers; negative ones in two's complement.
        scale: ``[N, G, 1]``.
        minimum: ``[N, G, 1]``; the zero point where the format has one; None where it has neither.
        format: name.
        shape: ``(N, K)``.
        activation: see `QuantizedTensor`.
    """
    parameters = [scale[..., 0]]
    if minimum is not None and FORMATS[format].has_minimum:
        parameters.append(minimum[..., 0])
    return pack_stored(codes, parameters, format, shape, activation)


def pack_stored(
    codes: Tensor,
    parameters: Sequence[Tensor],
    format: str,
    shape: tuple[int, int],
    activation: str,
) -> QuantizedTensor:
    """The same from what the format stores.

    Args:
        codes: see `pack`.
        parameters: ``[N, G]`` each: (scale, minimum) for "scale+minimum"; (scale, zero) where the
            format has a zero point; (d, dmin, scales, minima) for "q4_k" and (d, scales) for
            "q6_k", integers but for d and dmin, which are the same for all groups of a bundle; else
            (scale,).
        format: see `pack`.
        shape: see `pack`.
        activation: see `pack`.
    """
    form = FORMATS[format]
    stored = _pack_parameters([_by_bundle(_to_strips(t), form) for t in parameters], form)
    bundles = torch.cat([_pack_codes(codes, form), stored], 2)
    return QuantizedTensor(bundles.flatten(1), format, shape, codes.shape[2], activation)


def unpack(qt: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, G, g]`` (uint8), scale and minimum ``[N, G, 1]`` (float32)."""
    form = FORMATS[qt.format]
    lines = _bundles(qt)[..., : -form.parameter_bytes].unflatten(2, (form.bundle, -1))
    codes = _unpack_lines(lines.flatten(1, 2)[:, : _groups(qt)], form.bits)
    scale, minimum = unpack_parameters(qt)
    return codes.flatten(0, 1)[: qt.shape[0]], scale, minimum


def unpack_parameters(qt: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum ``[N, G, 1]``, float32."""
    form = FORMATS[qt.format]
    stored = _bundles(qt)[..., -form.parameter_bytes :]
    scale, minimum = (  # [S, groups, 16]
        t.flatten(1, 2)[:, : _groups(qt)] for t in _unpack_parameters(stored, form)
    )
    n, _ = qt.shape
    scale, minimum = (t.transpose(1, 2).flatten(0, 1)[:n, :, None] for t in (scale, minimum))
    return scale, minimum


def with_codes(qt: QuantizedTensor, codes: Tensor) -> QuantizedTensor:
    """The same scales and minima with other codes ``[N, G, g]``."""
    form = FORMATS[qt.format]
    stored = _bundles(qt)[..., -form.parameter_bytes :]
    bundles = torch.cat([_pack_codes(codes, form), stored], 2)
    return replace(qt, packed=bundles.flatten(1))


def _groups(qt: QuantizedTensor) -> int:
    return -(-qt.shape[1] // qt.group_size)


def _bundles(qt: QuantizedTensor) -> Tensor:
    """Packed bytes ``[S, bundles, bytes of one]``."""
    strips, stored = packed_shape(qt.format, *qt.shape, qt.group_size)
    each = FORMATS[qt.format].bundle_bytes(qt.group_size)
    return qt.packed.reshape(strips, stored // each, each)


def _to_strips(t: Tensor) -> Tensor:
    """``[N, ...]`` to ``[S, 16, ...]``."""
    missing = -t.shape[0] % STRIP
    strips: Tensor = torch.cat([t, t.new_zeros(missing, *t.shape[1:])]).unflatten(0, (-1, STRIP))
    return strips


def _by_bundle(t: Tensor, form: Format) -> Tensor:
    """``[S, 16, G]`` to ``[S, bundles, groups of a bundle, 16]``."""
    missing = -t.shape[2] % form.bundle
    t = torch.cat([t, t.new_zeros(*t.shape[:2], missing)], 2)
    bundles: Tensor = t.unflatten(2, (-1, form.bundle))
    return bundles.permute(0, 2, 3, 1).contiguous()


# ---- codes ---------------------------------------------------------------------------------------


def _planes(bits: int) -> tuple[int, ...]:
    """Bits of the planes, the lower one first."""
    return {3: (2, 1), 5: (4, 1), 6: (4, 2)}.get(bits, (bits,))


def _run(bits: int) -> int:
    """Quartets after which the planes begin anew."""
    return 8 // min(_planes(bits))


def _pack_codes(codes: Tensor, form: Format) -> Tensor:
    """``[N, G, g]`` to ``[S, bundles, bytes of a bundle's lines]``."""
    lines = _pack_lines(_to_strips(codes.to(torch.uint8)), form.bits).flatten(2)
    missing = -lines.shape[1] % form.bundle
    lines = torch.cat([lines, lines.new_zeros(lines.shape[0], missing, lines.shape[2])], 1)
    bundles: Tensor = lines.unflatten(1, (-1, form.bundle))
    return bundles.flatten(2)


def _pack_lines(codes: Tensor, bits: int) -> Tensor:
    """``[S, 16, G, g]`` to ``[S, G, runs, lines, 16, 4]``; a line has ``8 / plane`` quartets."""
    runs = codes.unflatten(3, (-1, _run(bits), 4))
    lines, below = [], 0
    for plane in _planes(bits):
        part = (runs >> below) & ((1 << plane) - 1)
        quartets = part.unflatten(4, (-1, 8 // plane))  # [S, 16, G, runs, lines, quartets, 4]
        shifts = torch.arange(0, 8, plane, device=codes.device)[:, None]
        lines.append((quartets.int() << shifts).sum(5))
        below += plane
    return torch.cat(lines, 4).to(torch.uint8).permute(0, 2, 3, 4, 1, 5)


def _unpack_lines(lines: Tensor, bits: int) -> Tensor:
    """``[S, G, bytes]`` to ``[S, 16, G, g]``."""
    runs = lines.unflatten(2, (-1, _run(bits) * bits // 8, STRIP, 4)).permute(0, 4, 1, 2, 3, 5)
    codes, first, below = torch.zeros((), dtype=torch.uint8, device=lines.device), 0, 0
    for plane in _planes(bits):
        count = _run(bits) * plane // 8
        words = runs[..., first : first + count, :]  # [S, 16, G, runs, lines, 4]
        parts = [(words >> shift) & ((1 << plane) - 1) for shift in range(0, 8, plane)]
        codes = codes | (torch.stack(parts, 5) << below).flatten(4, 5)
        first, below = first + count, below + plane
    return codes.flatten(3)


# ---- parameters, rows of 16 ----------------------------------------------------------------------


def _pack_parameters(parts: Sequence[Tensor], form: Format) -> Tensor:
    """``[S, bundles, groups (or 1), 16]`` each to ``[S, bundles, bytes]``."""
    rows = [_as_stored(part, form) for part in parts]
    if form.parameters == "q4_k":
        d, dmin, scales, minima = rows
        rows = [d[:, :, :1], dmin[:, :, :1], _pack_six_bits(scales, minima)]
    elif form.parameters == "q6_k":
        d, scales = rows
        rows = [d[:, :, :1], scales, scales.new_zeros(*d.shape[:2], 2, STRIP)]
    return torch.cat([t.contiguous().view(torch.uint8).flatten(2) for t in rows], 2)


def _as_stored(part: Tensor, form: Format) -> Tensor:
    if not part.is_floating_point():
        return part.to(torch.int8).view(torch.uint8)
    if form.parameters == "e8m0":
        return (part.float().view(torch.int32) >> 23).to(torch.uint8)
    return part.float() if form.parameters.endswith("float32") else part.half()


def _unpack_parameters(stored: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """``[S, bundles, bytes]`` to scale and minimum ``[S, bundles, groups, 16]``."""
    if form.parameters == "q4_k":
        d, dmin = _halves(stored[..., : 4 * STRIP]).unflatten(2, (2, 1, STRIP)).unbind(2)
        scales, minima = _unpack_six_bits(stored[..., 4 * STRIP :].unflatten(2, (-1, STRIP)))
        return d * scales, -dmin * minima
    if form.parameters in ("scale+minimum", "scale+zero", "scale+zero float32"):
        wide = form.parameters.endswith("float32")
        rows = stored.contiguous().view(torch.float32) if wide else _halves(stored)
        scale, second = rows.unflatten(2, (2, 1, STRIP)).unbind(2)
        return scale, (-scale * second if form.has_zero else second)
    if form.parameters == "q6_k":
        d = _halves(stored[..., : 2 * STRIP])[:, :, None]
        scales = stored[..., 2 * STRIP : 18 * STRIP].contiguous().view(torch.int8)
        scale = d * scales.unflatten(2, (-1, STRIP)).float()
    elif form.parameters == "e8m0":
        exponents = stored.unflatten(2, (-1, STRIP)).int()
        scale = torch.where(exponents == 0, 1 << 22, exponents << 23).int().view(torch.float32)
        scale = torch.where(exponents == 255, torch.nan, scale)
    elif form.parameters == "float32":
        scale = stored.contiguous().view(torch.float32).unflatten(2, (-1, STRIP))
    else:
        scale = _halves(stored).unflatten(2, (-1, STRIP))
    return scale, torch.zeros_like(scale)


def _halves(stored: Tensor) -> Tensor:
    return stored.contiguous().view(torch.float16).float()


def _pack_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits in llama.cpp's 12 bytes: rows of dimension 2."""
    upper = [t[:, :, :4] | (t[:, :, 4:] >> 4 << 6) for t in (scales, minima)]
    return torch.cat([*upper, (scales[:, :, 4:] & 15) | (minima[:, :, 4:] << 4)], 2)


def _unpack_six_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    low, high, both = rows.unflatten(2, (3, 4)).unbind(2)
    scales = torch.cat([low & 63, (both & 15) | (low >> 6 << 4)], 2)
    minima = torch.cat([high & 63, (both >> 4) | (high >> 6 << 4)], 2)
    return scales.float(), minima.float()
