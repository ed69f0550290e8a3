"""The tensor types of GGUF: how a block's bytes become codes and parameters, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastweights.ops.quantization.layout import e8m0, pack_six_bits, unpack_six_bits

__all__ = ["FLOATS", "TYPES", "Blocks", "TensorType"]

Parts = tuple[Tensor, list[Tensor]]


def _any(parameters: list[Tensor]) -> bool:
    return True


@dataclass(frozen=True)
class Blocks:
    """A type whose blocks a packed weight holds without loss.

    Args:
        format: of the packed weight.
        group_size: of the packed weight.
        read: blocks uint8 ``[R, B, bytes]`` to codes ``[R, B, weights]`` and the parameters that
            the format stores, ``[R, B, groups]`` or ``[R, B, 1]`` where all groups have the same.
        write: the inverse, parameters in float32 where they are floats.
        fits: whether parameters are such as `read` gives; else they cannot be written.
    """

    format: str
    group_size: int
    read: Callable[[Tensor], Parts]
    write: Callable[[Tensor, list[Tensor]], Tensor]
    fits: Callable[[list[Tensor]], bool] = _any


@dataclass(frozen=True)
class TensorType:
    """Name, weights and bytes of a block, and how blocks are packed where that is possible."""

    name: str
    weights: int
    bytes: int
    blocks: Blocks | None = None


def _half(blocks: Tensor, offset: int) -> Tensor:
    """The float16 at a byte of every block ``[R, B, 1]``."""
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16)


def _bytes(values: Tensor) -> Tensor:
    """The float16 that the groups of a block share."""
    return values[..., :1].half().contiguous().view(torch.uint8)


def _nibbles(packed: Tensor) -> Tensor:
    """Byte j of a half: codes j (low nibble) and, the halves of a block later, j + half."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _pack_nibbles(codes: Tensor) -> Tensor:
    halves: tuple[Tensor, ...] = codes.unflatten(-1, (2, -1)).unbind(-2)
    return halves[0] | (halves[1] << 4)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Bit j of 4 little-endian bytes is bit 4 of code j."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(-2) << 4


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8)
    bits: Tensor = (codes >> 4).unflatten(-1, (4, 8))
    return (bits << shifts).sum(-1, dtype=torch.uint8)


def _read_scaled(b: Tensor) -> Parts:
    """Q4_0 and IQ4_NL."""
    return _nibbles(b[..., 2:]), [_half(b, 0)]


def _write_scaled(codes: Tensor, parameters: list[Tensor]) -> Tensor:
    return torch.cat([_bytes(parameters[0]), _pack_nibbles(codes)], -1)


def _read_q4_1(b: Tensor) -> Parts:
    return _nibbles(b[..., 4:]), [_half(b, 0), _half(b, 2)]


def _write_q4_1(codes: Tensor, parameters: list[Tensor]) -> Tensor:
    return torch.cat([*map(_bytes, parameters), _pack_nibbles(codes)], -1)


def _read_q5_0(b: Tensor) -> Parts:
    d = _half(b, 0)
    return _nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6]), [d, d * -16]


def _write_q5_0(codes: Tensor, parameters: list[Tensor]) -> Tensor:
    fifth, low = _pack_fifth_bits(codes), _pack_nibbles(codes & 15)
    return torch.cat([_bytes(parameters[0]), fifth, low], -1)


def _minimum_is_sixteen_scales(parameters: list[Tensor]) -> bool:
    scale, minimum = parameters
    return torch.equal(minimum, scale * -16)


def _read_q5_1(b: Tensor) -> Parts:
    return _nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8]), [_half(b, 0), _half(b, 2)]


def _write_q5_1(codes: Tensor, parameters: list[Tensor]) -> Tensor:
    fifth, low = _pack_fifth_bits(codes), _pack_nibbles(codes & 15)
    return torch.cat([*map(_bytes, parameters), fifth, low], -1)


def _read_q8_0(b: Tensor) -> Parts:
    return b[..., 2:], [_half(b, 0)]


def _write_q8_0(codes: Tensor, parameters: list[Tensor]) -> Tensor:
    return torch.cat([_bytes(parameters[0]), codes], -1)


def _read_mxfp4(b: Tensor) -> Parts:
    return _nibbles(b[..., 1:]), [e8m0(b[..., :1])]


def _write_mxfp4(codes: Tensor, parameters: list[Tensor]) -> Tensor:
    exponents = (parameters[0].contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return torch.cat([exponents, _pack_nibbles(codes)], -1)


def _read_q4_k(b: Tensor) -> Parts:
    """32 bytes hold 64 weights."""
    codes = _nibbles(b[..., 16:].unflatten(-1, (4, 32))).flatten(-2)
    return codes, [_half(b, 0), _half(b, 2), *unpack_six_bits(b[..., 4:16])]


def _write_q4_k(codes: Tensor, parameters: list[Tensor]) -> Tensor:
    d, dmin, scales, minima = parameters
    packed = _pack_nibbles(codes.unflatten(-1, (4, 64))).flatten(-2)
    return torch.cat([_bytes(d), _bytes(dmin), pack_six_bits(scales, minima), packed], -1)


def _read_q6_k(b: Tensor) -> Parts:
    """64 bytes of low bits and 32 of high ones hold 128 weights."""
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64)))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = ((b[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts) & 3).flatten(-2)
    scales = b[..., 192:208].contiguous().view(torch.int8)
    return (low | (high << 4)).flatten(-2), [_half(b, 208), scales]


def _write_q6_k(codes: Tensor, parameters: list[Tensor]) -> Tensor:
    d, scales = parameters
    halves = codes.unflatten(-1, (2, 128))
    low = _pack_nibbles(halves & 15).flatten(-2)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    quarters: Tensor = (halves >> 4).unflatten(-1, (4, 32))
    high = (quarters << shifts).sum(-2, dtype=torch.uint8).flatten(-2)
    return torch.cat([low, high, scales.contiguous().view(torch.uint8), _bytes(d)], -1)


FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Type id -> dtype of tensors that are read as they are."""

TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18, Blocks("int4_sym", 32, _read_scaled, _write_scaled)),
    3: TensorType("Q4_1", 32, 20, Blocks("int4", 32, _read_q4_1, _write_q4_1)),
    6: TensorType(
        "Q5_0", 32, 22, Blocks("int5", 32, _read_q5_0, _write_q5_0, _minimum_is_sixteen_scales)
    ),
    7: TensorType("Q5_1", 32, 24, Blocks("int5", 32, _read_q5_1, _write_q5_1)),
    8: TensorType("Q8_0", 32, 34, Blocks("int8_sym", 32, _read_q8_0, _write_q8_0)),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144, Blocks("q4_k", 32, _read_q4_k, _write_q4_k)),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210, Blocks("q6_k", 16, _read_q6_k, _write_q6_k)),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18, Blocks("iq4_nl", 32, _read_scaled, _write_scaled)),
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
    39: TensorType("MXFP4", 32, 17, Blocks("mxfp4", 32, _read_mxfp4, _write_mxfp4)),
    40: TensorType("NVFP4", 64, 36),
}
"""Type id -> type. Of those without `blocks` only the size is known here."""
