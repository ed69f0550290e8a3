"""A linear layer with low-rank updates, as its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastweights.ops._random import mixed, random_bits
from fastweights.ops.quantization import reference as quantization
from fastweights.ops.quantization.tensor import QuantizedTensor


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    *,
    segments: Tensor | None = None,
    indices: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    split: Sequence[int] | None = None,
) -> Tensor:
    """Same contract as `fastweights.lora_linear`."""
    if isinstance(weight, QuantizedTensor):
        y = quantization.quantized_linear(x, weight, bias)
    else:
        y = F.linear(x, weight.detach(), bias)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    dropped = x.to(exact)
    if dropout:
        assert seed is not None
        dropped = dropped * dropout_mask(x.shape, dropout, int(seed)).to(exact)
    sizes = [y.shape[-1]] if split is None else list(split)
    updates = [torch.zeros((*y.shape[:-1], size), dtype=exact) for size in sizes]
    for i, (a, b, s) in enumerate(zip(lora_a, lora_b, scale, strict=True)):
        adapter, projection = divmod(i, len(sizes))
        one = s.to(exact) * (dropped @ a.to(exact).T) @ b.to(exact).T
        updates[projection] = updates[projection] + one * _meets(adapter, x, segments, indices)
    return (y.to(exact) + torch.cat(updates, -1)).to(x.dtype)


def dropout_mask(shape: Sequence[int], p: float, seed: int) -> Tensor:
    """0 with probability p, else 1 / (1 - p), of a shape ``[..., columns]``; float64."""
    rows = torch.Size(shape[:-1]).numel()
    keys = [mixed(seed + 0x9E3779B97F4A7C15 * (row + 1)) for row in range(rows)]
    kept = random_bits(keys, shape[-1]) < int(min((1 - p) * 2**32, 2**32 - 1))
    return (kept.double() / (1 - p)).view(*shape)


def _meets(i: int, x: Tensor, segments: Tensor | None, indices: Tensor | None) -> Tensor:
    """Whether adapter i meets a row: 0 or 1, of x's shape with a last dimension of 1."""
    rows = x.shape[:-1]
    if indices is not None:
        mine = (indices == i).view(*indices.shape, *[1] * (len(rows) - indices.dim()))
        return mine.expand(rows).unsqueeze(-1)
    if segments is not None:
        number = torch.arange(rows.numel()).view(*rows, 1)
        return (number >= segments[i]) & (number < segments[i + 1])
    return torch.ones(*rows, 1, dtype=torch.bool)
