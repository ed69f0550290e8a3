"""Streams of codes that are not bytes: unpacking and packing, whatever the number of bits."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

__all__ = ["as_bytes", "as_words", "pack_bits", "unpack_bits"]


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row of a little-endian bit stream.

    Args:
        stream: uint8 ``[R, B]``; code i lies in bits ``i * bits`` to ``(i + 1) * bits - 1``,
            counted from the lowest bit of the first byte.
        bits: per code, 1 to 8.
        count: codes per row, at most ``8 * B // bits``.

    Returns:
        uint8 ``[R, count]``.
    """
    codes, size = _period(bits)
    periods = -(-count // codes)
    stream = _resize(stream, periods * size).unflatten(1, (periods, size))
    out = stream.new_empty(stream.shape[0], periods, codes)
    for i in range(codes):
        byte, shift = divmod(i * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code = code | (stream[..., byte + 1] << (8 - shift))
        out[..., i] = code & ((1 << bits) - 1)
    return out.flatten(1)[:, :count]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `unpack_bits`: uint8 ``[R, count]`` to uint8 ``[R, ceil(count * bits / 8)]``.

    Codes are less than ``2 ** bits``; bits beyond the last code are 0.
    """
    count = codes.shape[1]
    per_period, size = _period(bits)
    periods = -(-count // per_period)
    codes = _resize(codes, periods * per_period).unflatten(1, (periods, per_period))
    out = codes.new_zeros(codes.shape[0], periods, size)
    for i in range(per_period):
        byte, shift = divmod(i * bits, 8)
        out[..., byte] |= codes[..., i] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= codes[..., i] >> (8 - shift)
    return out.flatten(1)[:, : -(-count * bits // 8)]


def as_bytes(words: Tensor) -> Tensor:
    """Integers ``[R, C]`` of any size as little-endian uint8 ``[R, C * itemsize]``."""
    return _packed(words).view(torch.uint8)


def as_words(stream: Tensor) -> Tensor:
    """uint8 ``[R, B]`` as int32 ``[R, ceil(B / 4)]``, the last word filled up with zeros."""
    return _packed(_resize(stream, -(-stream.shape[1] // 4) * 4)).view(torch.int32)


def _packed(t: Tensor) -> Tensor:
    """A copy without gaps: to `contiguous` any stride of a single row or column is right."""
    return t.clone(memory_format=torch.contiguous_format)


def _period(bits: int) -> tuple[int, int]:
    """The least number of codes that fill whole bytes, and of bytes that they fill."""
    common = gcd(bits, 8)
    return 8 // common, bits // common


def _resize(t: Tensor, width: int) -> Tensor:
    """Rows cut, or filled up with zeros, to `width`."""
    missing = width - t.shape[1]
    return torch.nn.functional.pad(t, (0, missing)) if missing > 0 else t[:, :width]
