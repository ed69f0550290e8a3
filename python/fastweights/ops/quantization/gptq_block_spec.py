"""Spec of `gptq_block`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights.ops.quantization import gptq_block_reference
from fastweights.ops.quantization.gptq_block import gptq_block
from fastweights.testing.opspec import BadInput, BenchCase, OpSpec, Sample, Tolerance, sample
from fastweights.testing.peers import gptq_block as peers


def example(
    n: int, c: int, dtype: torch.dtype, *, bits: int = 4, spread: bool = False, seed: int = 0
) -> Sample:
    """A block of correlated inputs on a grid per row."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    w = draw(n, c)
    x = draw(2 * c + 1, c) @ (torch.eye(c) + 0.3 * draw(c, c))
    h = x.T @ x / len(x) + 0.01 * torch.eye(c)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    scale = (0.2 + 0.2 * draw(n, c).abs()) * 16 / 2**bits
    minimum = -(2 ** (bits - 1)) * scale + 0.1 * draw(n, c)
    if n:
        scale[:, ::7] = 0  # groups of equal weights
    p = 0.1 * draw(c, c).triu(1) / max(c, 1) ** 0.5 if spread else None
    tensors = (t.to(dtype) for t in (w, u, scale, minimum))
    return sample(*tensors, 0.0, 2.0**bits - 1, None if p is None else p.to(dtype))


def _samples(dtype: torch.dtype) -> list[Sample]:
    """Rows and columns around a vector, a tile of columns and a task; none at all."""
    calls = [
        example(n, c, dtype, bits=2 + i % 3, spread=bool(i % 2), seed=i)
        for i, (n, c) in enumerate(
            ((1, 1), (3, 7), (16, 8), (17, 16), (31, 33), (40, 128), (5, 150), (0, 9), (9, 0))
        )
    ]
    signed = example(20, 24, dtype, bits=8)
    return [*calls, Sample((*signed.args[:4], -127.0, 127.0), {})]


def _refused(message: str, **changes: Any) -> BadInput:
    def refused() -> None:
        names = ("w", "u", "scale", "minimum", "least", "most", "p")
        call = dict(zip(names, example(6, 5, torch.float32, spread=True).args, strict=True))
        for name, change in changes.items():
            call[name] = change(call[name]) if callable(change) else change
        gptq_block(**call)

    return BadInput(refused, RuntimeError, f"gptq_block: expected {message}")


SPEC = OpSpec(
    name="gptq_block",
    family="quantization",
    function=gptq_block,
    reference=gptq_block_reference.gptq_block,
    samples=_samples,
    # A sum of 150 products, and errors that are divided by a small diagonal.
    tolerances={torch.float32: Tolerance(2e-4, 0.0), torch.float64: Tolerance(1e-11, 0.0)},
    oracle_dtype=None,
    bad_inputs=(
        _refused(r"w of shape \[N, C\], got \[5\]", w=lambda t: t[0]),
        _refused("w of dtype float32 or float64, got bfloat16", w=lambda t: t.bfloat16()),
        _refused(r"u of shape \[C, C\] = \[5, 5\] \(from w\), got \[4, 5\]", u=lambda t: t[1:]),
        _refused("u of dtype float32", u=lambda t: t.double()),
        _refused(r"scale of shape \[N, C\] = \[6, 5\]", scale=lambda t: t[:, :1]),
        _refused(r"minimum of shape \[N, C\] = \[6, 5\]", minimum=lambda t: t[:1]),
        _refused(r"p of shape \[C, C\] = \[5, 5\]", p=lambda t: t[0]),
        _refused("integers least <= most of at most 2.21, got 0.5 and 15", least=0.5),
        _refused("integers least <= most of at most 2.21, got 0 and -1", most=-1.0),
        _refused("integers least <= most of at most 2.21, got 0 and 4.19", most=2.0**22),
        _refused("integers least <= most of at most 2.21, got 0 and nan", most=float("nan")),
    ),
    bench=[
        BenchCase(
            f"N{n} C{c}",
            make=lambda dtype, n=n, c=c: example(n, c, dtype),
            flops=1.0 * n * c * c,
            bytes=4.0 * (5 * n * c + c * c / 2),
            dtypes=(torch.float32, torch.float64),
        )
        for n, c in ((4096, 128), (1536, 128), (576, 64))
    ],
    peers=(peers.TORCH,),
)
