"""Where codes, scales and minima lie in a packed weight; csrc/quantization/kernel.h says it too."""

from __future__ import annotations

import torch
from torch import Tensor

from fastweights.ops.quantization.formats import FORMATS, LINE, STRIP, Format
from fastweights.ops.quantization.tensor import QuantizedTensor, packed_shape

__all__ = ["pack", "unpack", "unpack_parameters"]

_BLOCK = 32


def pack(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    format: str,
    shape: tuple[int, int],
    activation: str,
) -> QuantizedTensor:
    """Codes ``[N, G, g]``, scale and minimum ``[N, G, 1]`` in the layout of the kernels."""
    form, group_size = FORMATS[format], codes.shape[2]
    codes, scale, minimum = (
        _to_strips(t) for t in (codes.to(torch.uint8), scale.float(), minimum.float())
    )  # [S, 16, G, ...]
    lines = _pack_codes(codes, form.bits).flatten(2)  # [S, G, bytes]
    parameters = _pack_parameters(scale[..., 0], minimum[..., 0], form)
    missing = -lines.shape[1] % form.bundle
    bundles = [
        torch.cat([t, t.new_zeros(t.shape[0], missing, t.shape[2])], 1)
        .unflatten(1, (-1, form.bundle))
        .flatten(2)
        for t in (lines, parameters)
    ]
    stored = torch.cat(bundles, 2).flatten(1).contiguous()
    return QuantizedTensor(stored, format, shape, group_size, activation)


def unpack(qt: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, G, g]`` (uint8), scale and minimum ``[N, G, 1]`` (float32)."""
    form = FORMATS[qt.format]
    n, _ = qt.shape
    lines = _bundles(qt)[..., : -LINE].unflatten(2, (form.bundle, -1)).flatten(1, 2)
    codes = _unpack_codes(lines[:, : _groups(qt)], form.bits).flatten(0, 1)[:n]
    scale, minimum = unpack_parameters(qt)
    return codes, scale, minimum


def unpack_parameters(qt: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum ``[N, G, 1]``, float32."""
    form = FORMATS[qt.format]
    rows = _bundles(qt)[..., -LINE:].unflatten(2, (form.bundle, -1)).flatten(1, 2).contiguous()
    rows = rows[:, : _groups(qt)]
    if form.parameters == "e8m0":
        bits = torch.where(rows == 0, 1 << 22, rows.int() << 23)
        scale = bits.int().view(torch.float32)
        scale = torch.where(rows == 255, torch.nan, scale)
    elif form.parameters == "float32":
        scale = rows.view(torch.float32)
    else:
        scale = rows.view(torch.float16).float()
    minimum = scale[..., STRIP:] if form.has_minimum else torch.zeros_like(scale)
    n, _ = qt.shape
    scale, minimum = (
        t.transpose(1, 2).flatten(0, 1)[:n, :, None] for t in (scale[..., :STRIP], minimum)
    )
    return scale, minimum


def _groups(qt: QuantizedTensor) -> int:
    return -(-qt.shape[1] // qt.group_size)


def _bundles(qt: QuantizedTensor) -> Tensor:
    """Packed bytes ``[S, bundles, bytes of one]``."""
    form = FORMATS[qt.format]
    strips, stored = packed_shape(qt.format, *qt.shape, qt.group_size)
    each = form.bundle * qt.group_size // _BLOCK * form.bits * LINE + LINE
    return qt.packed.reshape(strips, stored // each, each)


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """``[S, 16, G, g]`` to ``[S, G, blocks * bits, 16, 4]``: lines of ``8 / bits`` quartets."""
    quartets = codes.unflatten(3, (-1, 8 // bits, 4))
    words = quartets[..., 0, :].clone()
    for u in range(1, 8 // bits):
        words |= quartets[..., u, :] << (bits * u)
    return words.permute(0, 2, 3, 1, 4)


def _unpack_codes(lines: Tensor, bits: int) -> Tensor:
    """``[S, G, bytes]`` to ``[S, 16, G, g]``."""
    words = lines.unflatten(2, (-1, STRIP, 4)).permute(0, 3, 1, 2, 4)
    quartets = [(words >> (bits * u)) & ((1 << bits) - 1) for u in range(8 // bits)]
    return torch.stack(quartets, 4).flatten(3)


def _pack_parameters(scale: Tensor, minimum: Tensor, form: Format) -> Tensor:
    """``[S, 16, G]`` to ``[S, G, bytes]``."""
    scale, minimum = scale.transpose(1, 2).contiguous(), minimum.transpose(1, 2).contiguous()
    if form.parameters == "e8m0":
        return (scale.view(torch.int32) >> 23).to(torch.uint8)
    if form.parameters == "float32":
        return scale.view(torch.uint8)
    rows = torch.cat([scale, minimum], 2) if form.has_minimum else scale
    return rows.half().view(torch.uint8)


def _to_strips(t: Tensor) -> Tensor:
    missing = -t.shape[0] % STRIP
    return torch.cat([t, t.new_zeros(missing, *t.shape[1:])]).unflatten(0, (-1, STRIP))
