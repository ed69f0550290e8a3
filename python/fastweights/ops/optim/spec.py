"""The ops of this family, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastweights.ops.optim import reference
from fastweights.ops.optim.functional import (
    dequantize_blockwise,
    optimizer_step,
    quantize_blockwise,
)
from fastweights.ops.optim.reference import Rule
from fastweights.testing.opspec import BadInput, BenchCase, OpSpec, Sample, Tolerance, sample
from fastweights.testing.peers import optim

STATES: dict[Rule, tuple[bool, ...]] = {
    "adam": (True, False),
    "lion": (True,),
    "momentum": (True,),
}


def example(
    rule: Rule,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    *,
    bits: int = 8,
    block_size: int = 256,
    **options: Any,
) -> Sample:
    """A step of parameters N(0, 1), with states as earlier steps left them."""
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    params, grads = ([draw(shape).to(dtype) for shape in shapes] for _ in range(2))
    lists: list[list[Tensor]] = [[], [], [], []]
    for s, signed in enumerate(STATES[rule]):
        for shape in shapes:
            state = (draw(shape) if signed else draw(shape).square()).to(wide)
            if bits == 8:
                state, absmax = reference.quantize_blockwise(
                    state, signed=signed, block_size=block_size
                )
                lists[2 + s].append(absmax)
            lists[s].append(state)
    numbers = {"step": 3, "lr": 0.1, "weight_decay": 0.1} | options
    return sample(params, grads, *lists, rule=rule, block_size=block_size, **numbers)


# Below, at and above a vector, a block and a task; an empty tensor.
_SHAPES = ((5,), (16,), (3, 7, 11), (256,), (257,), (0,), (4100,))


def _with_bad_gradients(call: Sample) -> Sample:
    """NaN, infinities and a gradient whose square overflows, and one block of nothing else."""
    for grad in call.args[1]:
        flat = grad.flatten()
        for i, bad in enumerate((torch.nan, torch.inf, -torch.inf, -torch.nan)):
            flat[i + 1 : i + 2] = bad
        flat[256:512] = torch.nan
        grad.copy_(flat.view(grad.shape))
    return call


def _samples(dtype: torch.dtype) -> Sequence[Sample]:
    wide = dtype == torch.float64
    calls = []
    for rule in STATES:
        if not wide:
            calls.append(example(rule, _SHAPES, dtype))
        calls.append(example(rule, _SHAPES[:5], dtype, bits=32))
    bits = 32 if wide else 8
    calls.append(example("adam", [(600,)], dtype, bits=bits, block_size=64, step=1, beta1=0.0))
    calls.append(example("lion", [], dtype, bits=bits))
    calls.append(example("momentum", [(2, 700)], dtype, bits=bits, seed=torch.tensor(7)))
    calls.append(example("lion", [(9,), (4200,)], dtype, bits=32, seed=torch.tensor([-1])))
    calls += [_with_bad_gradients(example(rule, [(700,)], dtype, bits=bits)) for rule in STATES]
    return calls


# One code more or less is at most 1/128: two of the 255 levels may be equally near. What the codes,
# and the parameters alone, must be is said more sharply in tests/optim.
_TOLERANCES = {
    torch.float32: Tolerance(8e-3, 0.0),
    torch.bfloat16: Tolerance(8e-3, 0.0),
    torch.float16: Tolerance(8e-3, 0.0),
    torch.float64: Tolerance(1e-13, 0.0),
}


def _refused(message: str, **changes: Any) -> BadInput:
    def refused() -> None:
        bound = SPECS[0].bind(example("adam", [(300,), (4, 5)]))
        for name, change in changes.items():
            bound[name] = change(bound[name]) if callable(change) else change
        optimizer_step(**bound)

    return BadInput(refused, RuntimeError, f"optimizer_step: expected {message}")


_BAD_STEPS = (
    _refused("rule adam, lion or momentum, got 'adamw'", rule="adamw"),
    _refused(r"2 tensors in grads \(from params\), got 1", grads=lambda t: t[:1]),
    _refused(r"2 tensors in state2 \(from params\), got 0", state2=()),
    _refused(r"2 tensors in absmax2 \(from params\), got 0", absmax2=()),
    _refused(r"0 tensors in state2 \(from params\), got 2", rule="lion"),
    _refused(r"grads of shape \[300\] \(from params\), got \[4, 5\]", grads=lambda t: t[::-1]),
    _refused("grads of dtype float32", grads=lambda t: [g.double() for g in t]),
    _refused("params to be contiguous", params=lambda t: [t[0], t[1].T.contiguous().T]),
    _refused("params of dtype float32, bfloat16", params=lambda t: [p.int() for p in t]),
    _refused(
        "params of dtype float32, bfloat16 or float16 for states of 8 bits, got float64",
        params=lambda t: [p.double() for p in t],
    ),
    _refused("state1 of dtype uint8", state1=lambda t: [s.float() for s in t]),
    _refused("state1 of dtype float32", absmax1=(), absmax2=()),
    _refused("state2 of shape", state2=lambda t: t[::-1]),
    _refused("absmax1 of dtype float32", absmax1=lambda t: [a.double() for a in t]),
    _refused(r"absmax1 of shape \[ceil\(numel / block_size\)\] = \[5\]", block_size=64),
    _refused("block_size to be a power of two from 64 to 4096, got 100", block_size=100),
    _refused("step >= 1, got 0", step=0),
    _refused("0 <= beta1 < 1, got 1", beta1=1.0),
    _refused("0 <= beta2 < 1, got -0.5", beta2=-0.5),
    _refused("a finite lr >= 0, got nan", lr=float("nan")),
    _refused("a finite eps >= 0", eps=-1e-8),
    _refused("a finite weight_decay >= 0", weight_decay=float("inf")),
    _refused("seed of dtype int64", seed=torch.tensor(1.0)),
    _refused("a seed of one number", seed=torch.tensor([1, 2])),
)


def _numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def _quantize_samples(dtype: torch.dtype) -> Sequence[Sample]:
    calls = [sample(_numbers(dtype, shape)) for shape in (*_SHAPES, (2, 3, 200), ())]
    calls += [
        sample(_numbers(dtype, (4200,)).abs(), signed=False, block_size=b) for b in (64, 4096)
    ]
    calls.append(sample(torch.zeros(300, dtype=dtype)))
    return calls


def _dequantize_samples(dtype: torch.dtype) -> Sequence[Sample]:
    calls = []
    for shape, block in (((5,), 256), ((3, 171), 64), ((0,), 256), ((2, 4100), 4096), ((), 256)):
        numel = torch.Size(shape).numel()
        codes = (torch.arange(numel) * 7 % 256).to(torch.uint8).view(shape)
        absmax = _numbers(dtype, (-(-numel // block),)).abs()
        calls += [
            sample(codes, absmax, signed=signed, block_size=block) for signed in (True, False)
        ]
    return calls


_TINY = torch.rand(4, 100)
_CODES = torch.zeros(300, dtype=torch.uint8)

_BAD_CODECS = (
    BadInput(
        lambda: quantize_blockwise(_TINY.double()),
        RuntimeError,
        "quantize_blockwise: expected x of dtype float32, bfloat16 or float16, got float64",
    ),
    BadInput(
        lambda: quantize_blockwise(_TINY, block_size=32),
        RuntimeError,
        "quantize_blockwise: expected block_size to be a power of two from 64 to 4096, got 32",
    ),
)
_BAD_DECODERS = (
    BadInput(
        lambda: dequantize_blockwise(_CODES.int(), torch.ones(2)),
        RuntimeError,
        "dequantize_blockwise: expected codes of dtype uint8, got int32",
    ),
    BadInput(
        lambda: dequantize_blockwise(_CODES, torch.ones(3)),
        RuntimeError,
        r"expected absmax of shape \[ceil\(numel / block_size\)\] = \[2\] \(from codes\), got "
        r"\[3\]",
    ),
    BadInput(
        lambda: dequantize_blockwise(_CODES, torch.ones(2).double()),
        RuntimeError,
        "dequantize_blockwise: expected absmax of dtype float32, got float64",
    ),
    BadInput(
        lambda: dequantize_blockwise(_CODES, torch.ones(1), block_size=8192),
        RuntimeError,
        "dequantize_blockwise: expected block_size to be a power of two",
    ),
)

_MILLIONS = 8 << 20


def _bench(name: str, rule: Rule, bits: int, shapes: Sequence[tuple[int, ...]]) -> BenchCase:
    states = len(STATES[rule])
    return BenchCase(
        name=f"{name}, {bits}-bit {rule}",
        make=lambda dtype: example(rule, shapes, dtype, bits=bits, lr=1e-3),
        flops=_MILLIONS * (25.0 * states if bits == 8 else 8.0 * states),
        bytes=_MILLIONS * (12.0 + 2 * states * bits / 8),
        dtypes=(torch.float32, torch.bfloat16),
        backward=False,
        reference=False,
    )


_ONE = [(2048, 4096)]
_LAYERS = [shape for _ in range(8) for shape in ((1024, 512), (512, 1024), (512,), (512,))]

SPECS = [
    OpSpec(
        name="optimizer_step",
        family="optim",
        function=optimizer_step,
        reference=reference.optimizer_step,
        samples=_samples,
        tolerances=_TOLERANCES,
        mutates=("params", "state1", "state2", "absmax1", "absmax2"),
        bad_inputs=_BAD_STEPS,
        bench=(
            _bench("8M in one tensor", "adam", 8, _ONE),
            _bench("8M in 32 tensors", "adam", 8, _LAYERS),
            _bench("8M in one tensor", "adam", 32, _ONE),
            _bench("8M in one tensor", "lion", 8, _ONE),
            _bench("8M in one tensor", "momentum", 8, _ONE),
        ),
        peers=(optim.TORCH, optim.BITSANDBYTES, optim.TORCHAO),
        oracle_dtype=None,
    ),
    OpSpec(
        name="quantize_blockwise",
        family="optim",
        function=quantize_blockwise,
        reference=reference.quantize_blockwise,
        samples=_quantize_samples,
        tolerances={dtype: _TOLERANCES[dtype] for dtype in list(_TOLERANCES)[:3]},
        bad_inputs=_BAD_CODECS,
        oracle_dtype=None,
    ),
    OpSpec(
        name="dequantize_blockwise",
        family="optim",
        function=dequantize_blockwise,
        reference=reference.dequantize_blockwise,
        samples=_dequantize_samples,
        tolerances={torch.float32: Tolerance(1e-6, 0.0)},
        bad_inputs=_BAD_DECODERS,
        oracle_dtype=None,
    ),
]
