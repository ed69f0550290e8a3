"""What the codes of a quantized weight stand for, format by format."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["ALIASES", "FORMATS", "LINE", "STRIP", "Format", "resolve"]

STRIP = 16
"""Outputs that lie together."""

LINE = 64
"""Bytes of a line, the unit of everything that is stored."""

# Groups of a bundle, and lines that their parameters fill.
_BUNDLES = {
    "scale+minimum": (1, 1),
    "scale+zero": (1, 1),
    "scale+zero float32": (1, 2),
    "float16": (2, 1),
    "float32": (1, 1),
    "e8m0": (4, 1),
    "q4_k": (8, 4),
    "q6_k": (16, 5),
}


@dataclass(frozen=True)
class Format:
    """``W = scale * levels[code] + minimum``, scale and minimum per group of inputs.

    Args:
        bits: of a code.
        levels: by code.
        parameters: what a group stores: "scale+minimum" (two float16); "scale+zero" (two float16)
            and "scale+zero float32", where the minimum is ``-scale * zero``; only a scale, as
            "float16", "float32" or "e8m0" (a byte e for 2^(e - 127)); or "q4_k" and "q6_k",
            numbers of few bits that 8 and 16 groups share a float16 scale for.
        group_size: inputs per scale where the caller has no wish.
        any_group: whether other multiples of 32 will do.
        small_group: whether 16 will do.
        image: by code, the integers that stand for the levels where activations are int8; None:
            the levels themselves.
        image_unit: an image of 1 is this level.
        activations: what it can meet.
    """

    bits: int
    levels: tuple[float, ...]
    parameters: str
    group_size: int = 64
    any_group: bool = True
    small_group: bool = False
    image: tuple[int, ...] | None = None
    image_unit: float = 1.0
    activations: tuple[str, ...] = ("float", "int8")

    @property
    def is_grid(self) -> bool:
        """Whether levels are consecutive integers, so that rounding finds the nearest."""
        return all(isinstance(level, int) for level in self.levels) and self.image is None

    @property
    def extent(self) -> tuple[float, float]:
        """Least and largest level that is written; -128 has no opposite and never is."""
        return max(min(self.levels), -127.0), max(self.levels)

    @property
    def has_minimum(self) -> bool:
        """Whether a group has a minimum beside its scale."""
        return self.parameters in ("scale+minimum", "q4_k") or self.has_zero

    @property
    def has_zero(self) -> bool:
        """Whether it is given by a zero point."""
        return self.parameters.startswith("scale+zero")

    @property
    def bundle(self) -> int:
        """Groups whose parameters lie together."""
        return _BUNDLES[self.parameters][0]

    @property
    def parameter_bytes(self) -> int:
        """Of a bundle of one strip."""
        return _BUNDLES[self.parameters][1] * LINE

    def bundle_bytes(self, group_size: int) -> int:
        """Codes and parameters of a bundle of one strip."""
        return self.bundle * group_size * STRIP * self.bits // 8 + self.parameter_bytes

    def encode(self, levels: Tensor) -> Tensor:
        """Codes (uint8) of levels of a grid."""
        return ((levels - self.levels[0]) % (1 << self.bits)).to(torch.uint8)

    def accepts(self, group_size: int) -> bool:
        """Whether a scale may belong to so many inputs."""
        if not self.any_group:
            return group_size == self.group_size
        small = self.small_group and group_size == 16
        return small or (0 < group_size <= 1 << 16 and group_size % 32 == 0)


# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
_NF4_IMAGE = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)
_FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
    0.1666666716337204, 0.25,
)
_FP4_IMAGE = (0, 1, 64, 96, 32, 48, 16, 24)  # 1/192 becomes 1/96, the others are exact
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_IMAGE = (0, 1, 2, 3, 4, 6, 8, 12)
# fmt: on
_E4M3 = tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())


def _and_negative(half: tuple[float, ...]) -> tuple[float, ...]:
    return half + tuple(-level for level in half)


def _integers_and_negative(half: tuple[int, ...]) -> tuple[int, ...]:
    return half + tuple(-level for level in half)


_INTEGERS = {
    "int4": Format(4, tuple(range(16)), "scale+minimum", small_group=True),
    "int8": Format(8, (*range(128), *range(-128, 0)), "scale+minimum", small_group=True),
    "int2": Format(2, tuple(range(4)), "scale+minimum", small_group=True),
    "int3": Format(3, tuple(range(8)), "scale+minimum"),
    "int5": Format(5, tuple(range(32)), "scale+minimum"),
    "int6": Format(6, tuple(range(64)), "scale+minimum", small_group=True),
}

FORMATS = {
    **_INTEGERS,
    **{f"{name}_zp": replace(form, parameters="scale+zero") for name, form in _INTEGERS.items()},
    **{
        f"{name}_zp32": replace(form, parameters="scale+zero float32")
        for name, form in _INTEGERS.items()
    },
    "int4_sym": Format(4, tuple(range(-8, 8)), "float16", group_size=32),
    "int8_sym": Format(8, (*range(128), *range(-128, 0)), "float16", group_size=32),
    "q4_k": Format(4, tuple(range(16)), "q4_k", group_size=32, any_group=False),
    "q6_k": Format(6, tuple(range(-32, 32)), "q6_k", group_size=16, any_group=False),
    "fp8_e4m3": Format(8, _E4M3, "float32", activations=("float",)),
    "nf4": Format(4, _NF4, "float32", image=_NF4_IMAGE, image_unit=1 / 127),
    "fp4": Format(
        4,
        _and_negative(_FP4),
        "float32",
        image=_integers_and_negative(_FP4_IMAGE),
        image_unit=1 / 96,
    ),
    "iq4_nl": Format(4, _IQ4_NL, "float16", group_size=32, image=_IQ4_NL),
    "mxfp4": Format(
        4,
        _and_negative(_E2M1),
        "e8m0",
        group_size=32,
        any_group=False,
        image=_integers_and_negative(_E2M1_IMAGE),
        image_unit=0.5,
    ),
}
"""By name."""

ALIASES = {
    "q4_0": ("int4_sym", 32),
    "q4_1": ("int4", 32),
    "q5_1": ("int5", 32),
    "q8_0": ("int8_sym", 32),
}
"""GGUF's names for a format and a group size."""


def resolve(format: str, group_size: int | None) -> tuple[str, int]:
    """The format's own name and the inputs per scale, where an alias or no group size is given.

    Raises:
        ValueError: an unknown format.
    """
    if format in ALIASES and group_size in (None, ALIASES[format][1]):
        return ALIASES[format]
    if format not in FORMATS:
        known = sorted([*FORMATS, *ALIASES])
        raise ValueError(f"quantize: expected format in {known}, got {format!r}")
    return format, FORMATS[format].group_size if group_size is None else group_size
