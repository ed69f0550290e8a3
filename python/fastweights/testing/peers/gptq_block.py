"""The columns of a block of GPTQ in plain torch, laid out as torch likes it best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights.testing.opspec import Peer, Sample, sample

__all__ = ["TORCH"]


def _columns_in_rows(
    w: Tensor, u: Tensor, scale: Tensor, minimum: Tensor, least: float, most: float
) -> Any:
    """All matrices transposed, so that a column of the weight lies together."""
    w = w.clone()
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    for i in range(len(w)):
        code = ((w[i] - minimum[i]) * inverse[i]).round_().clamp_(least, most)
        error = (w[i] - torch.addcmul(minimum[i], scale[i], code)) / u[i, i]
        w[i + 1 :].addr_(u[i, i + 1 :], error, alpha=-1)
        codes[i], errors[i] = code, error
    return codes, errors


def _adapt(call: Sample) -> Sample | None:
    w, u, scale, minimum, least, most, p = call.args
    if p is not None:
        return None
    return sample(*(t.contiguous() for t in (w.T, u, scale.T, minimum.T)), least, most)


TORCH = Peer("torch, transposed", lambda: _columns_in_rows, _adapt, backward=False)
