"""From the dtype that sums are made in to the one that they are kept in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ROUNDINGS", "rounded", "wide_dtype"]

ROUNDINGS = ("nearest", "stochastic")
_HALF = (torch.bfloat16, torch.float16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to compute in so that rounding to `dtype` is all the error."""
    return torch.float32 if dtype in _HALF else torch.float64


def rounded(x: Tensor, dtype: torch.dtype, rounding: str) -> Tensor:
    """To the nearest number of a dtype; "stochastic": to either neighbour, exact on average.

    Only bfloat16 and float16 are rounded by chance.
    """
    near = x.to(dtype)
    if rounding == "nearest" or dtype not in _HALF:
        return near
    error = x - near.to(x.dtype)
    other = torch.nextafter(
        near, torch.copysign(torch.full_like(error, torch.inf), error).to(dtype)
    )
    chance = error / (other.to(x.dtype) - near.to(x.dtype))
    return torch.where(torch.rand_like(error) < chance, other, near)
