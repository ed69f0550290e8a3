"""A block of GPTQ in plain torch: the definition that the kernel is held against."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gptq_block"]


def gptq_block(
    w: Tensor,
    u: Tensor,
    scale: Tensor,
    minimum: Tensor,
    least: float,
    most: float,
    p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `fastweights.functional.gptq_block`."""
    w = w.detach().clone()
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    for i in range(w.shape[1]):
        code = ((w[:, i] - minimum[:, i]) * inverse[:, i]).clamp(least, most).round()
        error = (w[:, i] - (scale[:, i] * code + minimum[:, i])) / u[i, i]
        w[:, i + 1 :].addr_(error, u[i, i + 1 :], alpha=-1)
        if p is not None:
            w[:, i + 1 :].addr_(w[:, i], p[i, i + 1 :], alpha=-1)
        codes[:, i], errors[:, i] = code, error
    return codes, errors
