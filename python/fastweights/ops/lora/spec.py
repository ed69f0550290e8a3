"""The op of this family, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastweights.ops.lora import reference
from fastweights.ops.lora.functional import lora_linear
from fastweights.ops.quantization.functional import quantize
from fastweights.testing.opspec import BadInput, BenchCase, OpSpec, Sample, Tolerance, sample
from fastweights.testing.peers import lora


def _draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def _call(
    dtype: torch.dtype,
    rows: tuple[int, ...],
    in_features: int,
    out_features: int,
    ranks: Sequence[int],
    bias: bool = True,
    **options: Any,
) -> Sample:
    x, w, b = _draw(dtype, (*rows, in_features), (out_features, in_features), (out_features,))
    lora_a = [_draw(dtype, (r, in_features))[0] for r in ranks]
    sizes = options.get("split", [out_features])
    lora_b = [_draw(dtype, (sizes[i % len(sizes)], r))[0] for i, r in enumerate(ranks)]
    scale = torch.linspace(0.5, 2.0, len(ranks), dtype=dtype)
    return sample(x, w, b if bias else None, lora_a, lora_b, scale, **options)


# Up to 32 rows of an adapter are few; blocks have 8 rows, and 32 where there are many; tiles have
# 16 rows; gradients go by 64 columns and 128 rows.
def _samples(dtype: torch.dtype) -> Sequence[Sample]:
    seed = torch.tensor(-7)
    return [
        _call(dtype, (1,), 33, 18, [3]),
        _call(dtype, (), 5, 7, [2]),
        _call(dtype, (2, 5), 16, 70, [4, 1], bias=False),
        _call(dtype, (270,), 8, 9, [9], dropout=0.5, seed=seed),
        _call(dtype, (3, 4), 67, 5, [2, 5], dropout=0.1, seed=seed),
        _call(dtype, (9,), 5, 3, [2, 3, 1], segments=torch.tensor([1, 4, 4, 8])),
        _call(dtype, (4,), 5, 3, [2, 0], segments=torch.tensor([0, 3, 4])),
        _call(dtype, (3, 7), 6, 4, [1, 2], indices=torch.tensor([1, -1, 0])),
        _call(
            dtype, (2, 3), 6, 4, [1, 2], indices=torch.tensor([[1, 0, 1], [-1, 0, 1]]).int(),
            dropout=0.3, seed=seed,
        ),
        _call(dtype, (16,), 300, 131, [19, 2]),
        _call(dtype, (50,), 34, 66, [17]),
        _call(dtype, (170,), 5, 40, [2, 9], indices=torch.arange(170) * 7 % 3 - 1),
        _call(dtype, (0, 3), 6, 4, [2]),
        _call(dtype, (3,), 6, 4, []),
        _call(dtype, (3,), 6, 4, [0, 2]),
        _call(dtype, (2, 5), 16, 70, [4, 1, 2], split=[33, 5, 32], dropout=0.3, seed=seed),
        _call(dtype, (6,), 7, 30, [2, 1, 0, 3], split=[20, 10]),
        _call(
            dtype, (7,), 5, 9, [2, 3, 1, 1], split=[4, 5],
            indices=torch.tensor([1, 0, -1, 1, 0, 0, 1]),
        ),
        _call(dtype, (9,), 5, 9, [1, 2, 2, 0], split=[9, 0], segments=torch.tensor([1, 4, 8])),
        _quantized(dtype, (5,), 40, 20, [3]),
        _quantized(dtype, (4,), 64, 33, [2, 3], split=[17, 16]),
        _quantized(dtype, (2, 3), 64, 33, [2, 2], indices=torch.tensor([1, 0])),
    ]  # fmt: skip


def _quantized(dtype: torch.dtype, *shape: Any, **options: Any) -> Sample:
    call = _call(dtype, *shape, **options)
    x, w, *rest = call.args
    weight = quantize(w.float(), "int8", group_size=32)
    return Sample((x, weight, *rest), call.kwargs)


def _gradcheck() -> Sequence[Sample]:
    double = torch.float64
    return [
        _call(double, (3,), 5, 4, [2, 1], dropout=0.4, seed=torch.tensor(3)),
        _call(double, (2, 3), 5, 4, [2, 1], bias=False, indices=torch.tensor([1, -1])),
        _quantized(double, (3,), 5, 4, [2]),
        _call(double, (3,), 5, 4, [2, 1], split=[3, 1]),
    ]


_TOLERANCES = {
    torch.float32: Tolerance(4e-6, 1e-5),
    torch.bfloat16: Tolerance(1.6e-2, 1.6e-2),
    torch.float16: Tolerance(2e-3, 2e-3),
    torch.float64: Tolerance(1e-13, 1e-13),
}

_X = torch.rand(2, 4)
_W = torch.rand(3, 4)
_A = [torch.rand(2, 4)]
_B = [torch.rand(3, 2)]
_S = torch.ones(1)

_BAD_INPUTS = (
    BadInput(
        lambda: lora_linear(_X, torch.rand(3, 5), None, _A, _B, _S),
        RuntimeError,
        r"lora_linear: expected x \[..., in_features\] and weight \[out_features, in_features\], "
        r"got \[2, 4\] and \[3, 5\]",
    ),
    BadInput(
        lambda: lora_linear(_X, _W.half(), None, _A, _B, _S),
        RuntimeError,
        r"expected weight of dtype float32 \(from x\), got float16",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, torch.rand(4), _A, _B, _S),
        RuntimeError,
        r"expected bias of shape \[out_features\] = \[3\] \(from weight\), got \[4\]",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, [torch.rand(2, 5)], _B, _S),
        RuntimeError,
        r"expected lora_a of shape \[rank, in_features\] = \[2, 4\] \(from x\), got \[2, 5\]",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, [torch.rand(3, 3)], _S),
        RuntimeError,
        r"expected lora_b of shape \[out_features, rank\] = \[3, 2\] \(from y and lora_a\), got",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, _B * 2, _S),
        RuntimeError,
        r"expected as many lora_b as lora_a = 1, got 2",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, _B, torch.ones(2)),
        RuntimeError,
        r"expected scale of shape \[adapters\] = \[1\] \(from lora_a\), got \[2\]",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, _B, _S, split=[2, 2]),
        RuntimeError,
        r"expected split into sizes that add up to out_features = 3, got 2 at 1",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, _B, _S, split=[2]),
        RuntimeError,
        r"expected split into sizes that add up to out_features = 3, got 2$",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, _B, _S, split=[2, 1]),
        RuntimeError,
        r"expected a lora_a for each of 2 projections \(from split\) and adapter, got 1",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A * 2, _B * 2, torch.ones(2), split=[2, 1]),
        RuntimeError,
        r"expected lora_b of shape \[out_features, rank\] = \[2, 2\] \(from split and lora_a\)",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, _B, _S, segments=torch.tensor([0, 3])),
        RuntimeError,
        r"expected segments to ascend within 0 and 2 rows, got 3 at 1",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, _B, _S, indices=torch.tensor([0, 1])),
        RuntimeError,
        r"expected indices from -1 to 0, got 1",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, _B, _S, indices=torch.tensor([0, 0, 0])),
        RuntimeError,
        r"expected indices of a shape that x's begins with .* got \[3\]",
    ),
    BadInput(
        lambda: lora_linear(
            _X, _W, None, _A, _B, _S, indices=torch.zeros(2).long(), segments=torch.zeros(2).long()
        ),
        RuntimeError,
        r"expected segments or indices, got both",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, _B, _S, dropout=0.5),
        RuntimeError,
        r"expected a seed for dropout 0.5, got None",
    ),
    BadInput(
        lambda: lora_linear(_X, _W, None, _A, _B, _S, dropout=1.0, seed=torch.tensor(0)),
        RuntimeError,
        r"expected 0 <= dropout < 1, got 1",
    ),
)

_HALF = (torch.float32, torch.bfloat16)


def _bench(m: int, d: int, rank: int, format: str | None = None, adapters: int = 1) -> BenchCase:
    def make(dtype: torch.dtype) -> Sample:
        x, w = _draw(dtype, (m, d), (d, d))
        weight = quantize(w, format) if format else w
        lora_a = [torch.randn(rank, d) / d**0.5 for _ in range(adapters)]
        lora_b = [torch.randn(d, rank) for _ in range(adapters)]
        routes = {} if adapters == 1 else {"indices": torch.arange(m) % adapters}
        return sample(x, weight, None, lora_a, lora_b, torch.ones(adapters), **routes)

    base = format or "float"
    name = f"{base} M{m} D{d} r{rank}" + (f" {adapters} adapters" if adapters > 1 else "")
    weight_bytes = d * d * (4.5 / 8 if format else 4)
    return BenchCase(
        name,
        make=make,
        flops=2.0 * m * d * (d + 2 * rank),
        bytes=weight_bytes + 8 * rank * d * adapters + 8 * m * d,
        dtypes=_HALF,
        backward=m > 16 and adapters == 1,
        reference=False,
        # So that few rows meet weights that come from memory, as in a model.
        copies=max(1, (1 << 26) // (d * d)) if m <= 16 else 1,
    )


_BENCH = [_bench(m, d, r) for d in (768, 2048, 4096) for r in (8, 64) for m in (1, 16, 512)]
_BENCH += [_bench(512, 2048, 16), _bench(32, 2048, 16, adapters=8)]
_BENCH += [_bench(m, 2048, 16, "nf4") for m in (1, 512)]

SPECS = [
    OpSpec(
        name="lora_linear",
        family="lora",
        function=lora_linear,
        reference=reference.lora_linear,
        samples=_samples,
        tolerances=_TOLERANCES,
        differentiable=("x", "bias", "lora_a", "lora_b"),
        gradcheck=_gradcheck,
        bad_inputs=_BAD_INPUTS,
        bench=_BENCH,
        matmul=True,
        peers=[lora.BASE, lora.PEFT, lora.PEFT_BITSANDBYTES],
        sums_by_order=("outputs", "gradients"),  # torch's own product
    ),
]
