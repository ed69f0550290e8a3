"""The random numbers of the kernels (csrc/core/random.h) in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 2**64 - 1
_HALF = 2**32 - 1


def mixed(x: int) -> int:
    """SplitMix64's finaliser: 64 bits that look random for every x."""
    x &= _WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return x ^ (x >> 31)


def random_bits(keys: Sequence[int], size: int) -> Tensor:
    """32 random bits for the counters 0 .. size - 1 of each key: int64 ``[len(keys), size]``."""
    halves = [[key >> 32, key & _HALF] for key in keys]
    high, low = torch.tensor(halves, dtype=torch.int64).view(-1, 2, 1).unbind(1)
    x = torch.arange(size) ^ low
    x = (x ^ (x >> 16)) * 0x7FEB352D & _HALF
    x = (x ^ (x >> 15) ^ high) * 0x846CA68B & _HALF
    return x ^ (x >> 16)
