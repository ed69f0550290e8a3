"""The tensor types of GGUF: how a block's bytes become codes, scale and minimum, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FLOATS", "TYPES", "Blocks", "TensorType"]

Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Blocks:
    """A type whose blocks the packed weight holds without loss.

    Args:
        format: of the packed weight.
        read: blocks uint8 ``[R, G, bytes]`` to codes ``[R, G, 32]`` (uint8 for "int4", int8 for
            "int8"), scale and minimum float16 ``[R, G]``.
        write: the inverse.
        fits: whether codes, scale and minimum are such as `read` gives; else they cannot be
            written in this type.
    """

    format: str
    read: Callable[[Tensor], Parts]
    write: Callable[[Tensor, Tensor, Tensor], Tensor]
    fits: Callable[[Tensor, Tensor, Tensor], bool]


@dataclass(frozen=True)
class TensorType:
    """Name, weights and bytes of a block, and how blocks are packed where that is possible."""

    name: str
    weights: int
    bytes: int
    blocks: Blocks | None = None


def _half(blocks: Tensor, offset: int) -> Tensor:
    """The float16 at a byte of every block."""
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16)[..., 0]


def _bytes(*values: Tensor) -> Tensor:
    """float16 ``[R, G]`` side by side as bytes."""
    return torch.stack(values, -1).view(torch.uint8)


def _nibbles(packed: Tensor) -> Tensor:
    """Byte j of 16: codes j (low nibble) and j + 16."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _pack_nibbles(codes: Tensor) -> Tensor:
    return codes[..., :16] | (codes[..., 16:] << 4)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Bit j of 4 little-endian bytes is bit 4 of code j."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(-2) << 4


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8)
    bits: Tensor = ((codes >> 4) & 1).unflatten(-1, (4, 8))
    return (bits << shifts).sum(-1, dtype=torch.uint8)


def _read_q4_0(b: Tensor) -> Parts:
    d = _half(b, 0)
    return _nibbles(b[..., 2:]), d, d * -8


def _write_q4_0(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return torch.cat([_bytes(scale), _pack_nibbles(codes)], -1)


def _read_q4_1(b: Tensor) -> Parts:
    return _nibbles(b[..., 4:]), _half(b, 0), _half(b, 2)


def _write_q4_1(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return torch.cat([_bytes(scale, minimum), _pack_nibbles(codes)], -1)


def _read_q5_0(b: Tensor) -> Parts:
    codes = (_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6])) - 16
    d = _half(b, 0)
    return codes.view(torch.int8), d, torch.zeros_like(d)


def _write_q5_0(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    codes = codes.view(torch.uint8) + 16
    return torch.cat([_bytes(scale), _pack_fifth_bits(codes), _pack_nibbles(codes & 15)], -1)


def _read_q5_1(b: Tensor) -> Parts:
    codes = _nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])
    return codes.view(torch.int8), _half(b, 0), _half(b, 2)


def _write_q5_1(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    codes = codes.view(torch.uint8)
    parts = (_bytes(scale, minimum), _pack_fifth_bits(codes), _pack_nibbles(codes & 15))
    return torch.cat(parts, -1)


def _read_q8_0(b: Tensor) -> Parts:
    d = _half(b, 0)
    return b[..., 2:].contiguous().view(torch.int8), d, torch.zeros_like(d)


def _write_q8_0(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return torch.cat([_bytes(scale), codes.view(torch.uint8)], -1)


def _any(codes: Tensor, scale: Tensor, minimum: Tensor) -> bool:
    return True


def _minimum_is_eight_scales(codes: Tensor, scale: Tensor, minimum: Tensor) -> bool:
    return torch.equal(minimum, scale * -8)


def _no_minimum(codes: Tensor, scale: Tensor, minimum: Tensor) -> bool:
    return not bool(minimum.any())


def _no_minimum_and_five_bits(codes: Tensor, scale: Tensor, minimum: Tensor) -> bool:
    return not bool(minimum.any()) and bool(((codes >= -16) & (codes < 16)).all())


def _five_bits(codes: Tensor, scale: Tensor, minimum: Tensor) -> bool:
    return bool(((codes >= 0) & (codes < 32)).all())


FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Type id -> dtype of tensors that are read as they are."""

TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType(
        "Q4_0", 32, 18, Blocks("int4", _read_q4_0, _write_q4_0, _minimum_is_eight_scales)
    ),
    3: TensorType("Q4_1", 32, 20, Blocks("int4", _read_q4_1, _write_q4_1, _any)),
    6: TensorType(
        "Q5_0", 32, 22, Blocks("int8", _read_q5_0, _write_q5_0, _no_minimum_and_five_bits)
    ),
    7: TensorType("Q5_1", 32, 24, Blocks("int8", _read_q5_1, _write_q5_1, _five_bits)),
    8: TensorType("Q8_0", 32, 34, Blocks("int8", _read_q8_0, _write_q8_0, _no_minimum)),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
}
"""Type id -> type. Of those without `blocks` only the size is known here."""
