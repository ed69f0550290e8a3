"""The ops of this family, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastweights.ops.norms import reference
from fastweights.ops.norms.functional import gated_rms_norm, rms_norm
from fastweights.testing.opspec import BadInput, BenchCase, OpSpec, Sample, Tolerance, sample
from fastweights.testing.peers import norms


def _draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


# Tasks have 64 rows; the last dimension is below, at and above a vector, and no multiple of one.
_SHAPES = ((5,), (3, 16), (130, 33), (2, 5, 3, 8), (2, 1, 3, 2, 70), (4, 1), (0, 7), (3, 0))


def _eps(shape: tuple[int, ...]) -> float:
    """The norm of one number is its sign: without eps its gradient is rounding errors."""
    return 0.5 if shape[-1] == 1 else 1e-6


def _samples(dtype: torch.dtype) -> Sequence[Sample]:
    calls = []
    for i, shape in enumerate(_SHAPES):
        x, weight = _draw(dtype, shape, shape[-1:])
        calls.append(sample(x, *[weight][: 1 - i % 2], eps=_eps(shape)))
    return calls


def _gated_samples(dtype: torch.dtype) -> Sequence[Sample]:
    calls = []
    for i, shape in enumerate(_SHAPES):
        x, gate, weight = _draw(dtype, shape, shape, shape[-1:])
        calls.append(sample(x, gate, weight, eps=_eps(shape)))
        given = [weight][: i % 2]
        calls.append(sample(x, gate, *given, activation="sigmoid", eps=_eps(shape)))
    return calls


def _gradcheck() -> Sequence[Sample]:
    x, weight = _draw(torch.float64, (3, 5), (5,))
    return [sample(x, weight), sample(x)]


def _gated_gradcheck() -> Sequence[Sample]:
    x, gate, weight = _draw(torch.float64, (3, 5), (3, 5), (5,))
    return [
        sample(x, gate, *w, activation=activation)
        for activation in ("silu", "sigmoid")
        for w in ([weight], [])
    ]


_TOLERANCES = {
    torch.float32: Tolerance(2e-6, 1e-5),
    torch.bfloat16: Tolerance(8e-3, 8e-3),
    torch.float16: Tolerance(1e-3, 1e-3),
    torch.float64: Tolerance(1e-14, 1e-13),
}

_X = torch.rand(2, 5, 4)
_RAW = torch.ops.fastweights

_BAD_INPUTS = (
    BadInput(
        lambda: rms_norm(torch.tensor(1.0)),
        RuntimeError,
        r"rms_norm: expected x of shape \[..., D\], got \[\]",
    ),
    BadInput(
        lambda: rms_norm(_X.int()),
        RuntimeError,
        r"expected x of dtype float32, bfloat16, float16 or float64, got int32",
    ),
    BadInput(
        lambda: rms_norm(_X, torch.ones(5)),
        RuntimeError,
        r"expected weight of shape \[D\] = \[4\] \(from x\), got \[5\]",
    ),
    BadInput(
        lambda: rms_norm(_X, torch.ones(4).int()),
        RuntimeError,
        r"expected weight of dtype float32, bfloat16, float16 or float64, got int32",
    ),
    BadInput(
        lambda: _RAW.rms_norm_backward(_X[0], _X, None, eps=0.0),
        RuntimeError,
        r"rms_norm_backward: expected grad_y of shape \[..., D\] = \[2, 5, 4\] \(from x\), got",
    ),
)

_BAD_GATED_INPUTS = (
    BadInput(
        lambda: gated_rms_norm(_X, _X[:1]),
        RuntimeError,
        r"gated_rms_norm: expected gate of shape \[..., D\] = \[2, 5, 4\] \(from x\), got "
        r"\[1, 5, 4\]",
    ),
    BadInput(
        lambda: gated_rms_norm(_X, _X.half()),
        RuntimeError,
        r"expected gate of dtype float32 \(from x\), got float16",
    ),
    BadInput(
        lambda: gated_rms_norm(_X, _X, activation="tanh"),  # type: ignore[arg-type]
        RuntimeError,
        r"expected activation silu or sigmoid, got tanh",
    ),
)


def _bench(rows: int, D: int, *, gated: bool = False) -> BenchCase:
    def make(dtype: torch.dtype) -> Sample:
        shapes: list[Any] = [(rows, D)] * (2 if gated else 1)
        return sample(*_draw(dtype, *shapes, (D,)))

    return BenchCase(
        name=f"{rows} rows of {D}",
        make=make,
        flops=rows * D * (25.0 if gated else 5.0),
        bytes=rows * D * (12.0 if gated else 8.0),
        dtypes=(torch.float32, torch.bfloat16),
    )


_BENCH = ((2048, 2048), (32768, 128), (8, 2048))

SPECS = [
    OpSpec(
        name="rms_norm",
        family="norms",
        function=rms_norm,
        reference=reference.rms_norm,
        samples=_samples,
        tolerances=_TOLERANCES,
        differentiable=("x", "weight"),
        gradcheck=_gradcheck,
        bad_inputs=_BAD_INPUTS,
        bench=tuple(_bench(*shape) for shape in _BENCH),
        peers=(norms.RMS_NORM,),
    ),
    OpSpec(
        name="gated_rms_norm",
        family="norms",
        function=gated_rms_norm,
        reference=reference.gated_rms_norm,
        samples=_gated_samples,
        tolerances=_TOLERANCES,
        differentiable=("x", "gate", "weight"),
        gradcheck=_gated_gradcheck,
        bad_inputs=_BAD_GATED_INPUTS,
        bench=tuple(_bench(*shape, gated=True) for shape in _BENCH),
        peers=(norms.GATED, norms.QWEN3_NEXT),
    ),
]
