"""The ops of this family, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastweights.ops.causal_conv1d import reference
from fastweights.ops.causal_conv1d.functional import causal_conv1d, causal_conv1d_update
from fastweights.testing.opspec import BadInput, BenchCase, OpSpec, Sample, Tolerance, sample
from fastweights.testing.peers import conv1d


class _Draw:
    """Seeded arguments; `order` is the dimension of x that is contiguous, "D" or "T"."""

    def __init__(self, dtype: torch.dtype, B: int, T: int, D: int, W: int, order: str) -> None:
        self.generator = torch.Generator().manual_seed(T + D + W)
        self.dtype = dtype
        self.B, self.T, self.D, self.W, self.order = B, T, D, W, order

    def normal(self, *shape: int) -> Tensor:
        draw = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return draw.to(self.dtype)

    def signal(self) -> Tensor:
        if self.order == "D":
            return self.normal(self.B, self.T, self.D)
        return self.normal(self.B, self.D, self.T).transpose(1, 2)

    def call(
        self,
        *,
        bias: bool = True,
        residual: bool = False,
        state: int | None = None,
        sequences: int | None = None,
        **options: Any,
    ) -> Sample:
        given: dict[str, Any] = {}
        if residual:
            given["residual"] = self.signal()
        if state is not None:
            given["initial_state"] = self.normal(sequences or self.B, self.D, state)
        arguments = [self.signal(), self.normal(self.D, self.W)]
        arguments += [self.normal(self.D)] if bias else []
        return sample(*arguments, **given, **options)


def _runs(*lengths: int) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def _samples(dtype: torch.dtype) -> Sequence[Sample]:
    # Tiles have 128 tokens and 512 channels where channels are contiguous, 2048 tokens elsewhere.
    ends = torch.tensor([0, 0, 2, 9, 9, 40], dtype=torch.int32)
    index = torch.stack([_runs(1, 2, 20, 14), _runs(37), _runs(30, 7)]).int()
    calls = [
        _Draw(dtype, 1, 2054, 2, 4, "T").call(activation="silu", state=3, output_final_state=True),
        _Draw(dtype, 1, 134, 37, 4, "D").call(activation="silu", output_final_state=True),
        _Draw(dtype, 1, 5, 521, 4, "D").call(activation="swish", bias=False, residual=True),
    ]
    for order in "DT":
        calls += [
            _Draw(dtype, 2, 19, 5, 3, order).call(residual=True, state=2, output_final_state=True),
            _Draw(dtype, 1, 40, 18, 4, order).call(
                activation="silu", state=4, sequences=5, output_final_state=True, cu_seqlens=ends
            ),
            _Draw(dtype, 3, 37, 7, 4, order).call(
                activation="silu", residual=True, output_final_state=True, seq_idx=index, state=3
            ),
            _Draw(dtype, 1, 12, 3, 1, order).call(activation="silu", output_final_state=True),
            _Draw(dtype, 2, 23, 4, 7, order).call(bias=False, state=9, output_final_state=True),
            _Draw(dtype, 2, 3, 17, 6, order).call(
                activation="silu", state=5, output_final_state=True
            ),
            _Draw(dtype, 2, 0, 3, 4, order).call(state=3, output_final_state=True),
        ]
    calls.append(_Draw(dtype, 2, 1, 3, 2, "D").call(activation="silu", output_final_state=True))
    calls.append(_Draw(dtype, 2, 6, 0, 4, "D").call(state=3, output_final_state=True))
    calls.append(_Draw(dtype, 0, 6, 3, 4, "D").call(output_final_state=True))
    return calls


def _gradcheck() -> Sequence[Sample]:
    f64 = torch.float64
    calls = []
    for order in "DT":
        calls += [
            _Draw(f64, 1, 11, 3, W, order).call(
                activation="silu", residual=True, state=max(W, 1), output_final_state=True
            )
            for W in (1, 2, 3, 4)
        ]
        calls.append(
            _Draw(f64, 1, 9, 2, 4, order).call(
                activation="silu",
                state=3,
                sequences=4,
                output_final_state=True,
                cu_seqlens=torch.tensor([0, 2, 2, 8, 9]),
            )
        )
    return calls


def _update_samples(dtype: torch.dtype) -> Sequence[Sample]:
    def call(
        D: int, W: int, S: int, tokens: int | None, *, rows: int = 2, **options: Any
    ) -> Sample:
        draw = _Draw(dtype, 2, tokens or 1, D, W, "D")
        x = draw.signal() if tokens is not None else draw.signal()[:, 0]
        if options.pop("residual", False):
            options["residual"] = draw.normal(*x.shape)
        bias = [draw.normal(D)] if options.pop("bias", True) else []
        return sample(x, draw.normal(D, W), *bias, state=draw.normal(rows, D, S), **options)

    seen, index = torch.tensor([2, 9], dtype=torch.int32), torch.tensor([3, 0])
    ring: dict[str, Any] = {"cache_seqlens": seen}
    pool: dict[str, Any] = {"conv_state_indices": index, "rows": 5}
    return [
        call(37, 4, 4, None, activation="silu"),
        call(521, 4, 3, None, activation="silu", residual=True),
        call(5, 3, 2, 4, residual=True),
        call(6, 1, 0, None, bias=False),
        call(3, 2, 5, 2, activation="silu"),
        call(0, 4, 3, None),
        call(37, 4, 3, None, activation="silu", **ring),
        call(521, 4, 4, 9, residual=True, **ring, **pool),
        call(5, 3, 7, 2, cache_seqlens=seen.long(), conv_state_indices=index.int(), rows=4),
        call(4, 1, 0, 3, **ring),
        call(9, 4, 3, None, activation="silu", **pool),
    ]


_TOLERANCES = {
    torch.float32: Tolerance(3e-6, 2e-5),
    torch.bfloat16: Tolerance(1e-2, 2e-2),
    torch.float16: Tolerance(2e-3, 4e-3),
    torch.float64: Tolerance(1e-13, 1e-12),
}

_X, _W = torch.rand(2, 5, 4), torch.rand(4, 3)
_RAW = torch.ops.fastweights


def _raw(*args: Any, activation: str = "none", output_final_state: bool = False) -> object:
    given = [*args, *[None] * (7 - len(args))]
    result: object = _RAW.causal_conv1d(
        *given, activation=activation, output_final_state=output_final_state
    )
    return result


_BAD_INPUTS = (
    BadInput(
        lambda: causal_conv1d(_X[0], _W),
        RuntimeError,
        r"causal_conv1d: expected x of shape \[B, T, D\], got \[5, 4\]",
    ),
    BadInput(
        lambda: causal_conv1d(_X.int(), _W),
        RuntimeError,
        r"expected x of dtype float32, bfloat16, float16 or float64, got int32",
    ),
    BadInput(
        lambda: causal_conv1d(_X, _W[:3]),
        RuntimeError,
        r"expected weight of shape \[D, W\] = \[4, at least 1\] \(from x\), got \[3, 3\]",
    ),
    BadInput(lambda: causal_conv1d(_X, _W[:, :0]), RuntimeError, r"expected weight of shape"),
    BadInput(
        lambda: causal_conv1d(_X, _W[:, None]),
        RuntimeError,
        r"expected weight of shape \[D, W\], got \[4, 1, 3\]",
    ),
    BadInput(
        lambda: causal_conv1d(_X, _W, _W[:, 0][:3]),
        RuntimeError,
        r"expected bias of shape \[D\] = \[4\] \(from x\), got \[3\]",
    ),
    BadInput(
        lambda: causal_conv1d(_X, _W, activation="relu"),  # type: ignore[arg-type]
        ValueError,
        r"causal_conv1d: expected activation None, 'silu' or 'swish', got 'relu'",
    ),
    BadInput(
        lambda: causal_conv1d(_X, _W, residual=_X[:, 1:]),
        RuntimeError,
        r"expected residual of shape \[B, T, D\] = \[2, 5, 4\] \(from x\), got \[2, 4, 4\]",
    ),
    BadInput(
        lambda: causal_conv1d(_X, _W, residual=_X.double()),
        RuntimeError,
        r"expected residual of dtype float32 \(from x\), got float64",
    ),
    BadInput(
        lambda: causal_conv1d(_X, _W, initial_state=torch.zeros(2, 4, 1)),
        RuntimeError,
        r"expected initial_state of shape \[N, D, S\] = \[2, 4, at least 2\] \(from x, weight and "
        r"cu_seqlens\), got \[2, 4, 1\]",
    ),
    BadInput(
        lambda: causal_conv1d(_X, _W, initial_state=torch.zeros(2, 4, 2).half()),
        RuntimeError,
        r"expected initial_state of dtype float32 \(from x\), got float16",
    ),
    BadInput(
        lambda: causal_conv1d(_X, _W, seq_idx=torch.zeros(2, 4, dtype=torch.int32)),
        RuntimeError,
        r"expected seq_idx of shape \[B, T\] = \[2, 5\] \(from x\), got \[2, 4\]",
    ),
    BadInput(
        lambda: causal_conv1d(_X, _W, seq_idx=torch.zeros(2, 5)),
        RuntimeError,
        r"expected seq_idx of dtype int32 or int64, got float32",
    ),
    BadInput(
        lambda: causal_conv1d(_X, _W, cu_seqlens=torch.tensor([0, 5])),
        RuntimeError,
        r"expected B = 1 with cu_seqlens, got 2",
    ),
    BadInput(
        lambda: causal_conv1d(_X[:1], _W, cu_seqlens=torch.tensor([0, 4])),
        RuntimeError,
        r"expected cu_seqlens to end with T = 5, got 4",
    ),
    BadInput(
        lambda: causal_conv1d(
            _X[:1],
            _W,
            seq_idx=torch.zeros(1, 5, dtype=torch.int32),
            cu_seqlens=torch.tensor([0, 5]),
        ),
        RuntimeError,
        r"expected seq_idx or cu_seqlens, got both",
    ),
    BadInput(
        lambda: _raw(_X, _W, activation="gelu"),
        RuntimeError,
        r"expected activation silu or none, got gelu",
    ),
    BadInput(
        lambda: _RAW.causal_conv1d_backward(
            _X, torch.zeros(2, 4, 3), _X, _W, None, None, None, None, activation="none"
        ),
        RuntimeError,
        r"causal_conv1d_backward: expected grad_final_state with S = 2, got \[2, 4, 3\]",
    ),
)

_BAD_UPDATES = (
    BadInput(
        lambda: causal_conv1d_update(_X[0, 0], _W, state=torch.zeros(2, 4, 2)),
        RuntimeError,
        r"causal_conv1d_update: expected x of shape \[B, D\] or \[B, L, D\], got \[4\]",
    ),
    BadInput(
        lambda: causal_conv1d_update(_X[:, 0], _W, state=torch.zeros(2, 4, 1)),
        RuntimeError,
        r"expected state of shape \[N, D, S\] = \[2, 4, at least 2\]",
    ),
    BadInput(
        lambda: causal_conv1d_update(_X[:, 0], _W, state=torch.zeros(2, 4, 2).double()),
        RuntimeError,
        r"expected state of dtype float32 \(from x\), got float64",
    ),
    BadInput(
        lambda: causal_conv1d_update(_X[:, 0], _W, state=torch.zeros(2, 4, 2), residual=_X),
        RuntimeError,
        r"expected residual of shape \[B, D\] = \[2, 4\] \(from x\), got \[2, 5, 4\]",
    ),
    *(
        BadInput(
            lambda given=given: causal_conv1d_update(
                _X[:, 0], _W, state=torch.zeros(3, 4, 2), **given
            ),
            RuntimeError,
            message,
        )
        for given, message in (
            ({}, r"expected state of shape \[N, D, S\] = \[2, 4, at least 2\]"),
            (
                {"conv_state_indices": torch.tensor([0, 3])},
                r"expected conv_state_indices in \[0, N\) = \[0, 3\) \(from state\), got 3",
            ),
            ({"conv_state_indices": torch.tensor([-1, 0])}, r"got -1"),
            (
                {"conv_state_indices": torch.tensor([2, 2])},
                r"expected conv_state_indices to differ, got 2 twice",
            ),
            (
                {"conv_state_indices": torch.tensor([0])},
                r"expected conv_state_indices of shape \[B\] = \[2\] \(from x\), got \[1\]",
            ),
            (
                {"conv_state_indices": torch.tensor([0.0, 1.0])},
                r"expected conv_state_indices of dtype int32 or int64, got float32",
            ),
        )
    ),
    *(
        BadInput(
            lambda seen=seen: causal_conv1d_update(
                _X[:, 0], _W, state=torch.zeros(2, 4, 2), cache_seqlens=seen
            ),
            RuntimeError,
            message,
        )
        for seen, message in (
            (torch.tensor([0, -1]), r"expected cache_seqlens of at least 0, got -1"),
            (torch.tensor(3), r"expected cache_seqlens of shape \[B\] = \[2\] .*, got \[\]"),
            (
                torch.tensor([0, 1], dtype=torch.int16),
                r"expected cache_seqlens of dtype int32 or int64, got another dtype",
            ),
        )
    ),
    BadInput(
        lambda: causal_conv1d_update(
            _X[:, 0],
            _W,
            state=torch.zeros(2, 4, 2),
            activation="tanh",  # type: ignore[arg-type]
        ),
        ValueError,
        r"causal_conv1d_update: expected activation None, 'silu' or 'swish', got 'tanh'",
    ),
)


def _bench(T: int, D: int, order: str) -> BenchCase:
    return BenchCase(
        name=f"B1 T{T} D{D} W4 silu, {'channels' if order == 'D' else 'time'} contiguous",
        make=lambda dtype: _Draw(dtype, 1, T, D, 4, order).call(activation="silu"),
        flops=T * D * 28.0,
        bytes=T * D * 8.0,
        dtypes=(torch.float32, torch.bfloat16),
    )


def _update_bench(D: int) -> BenchCase:
    def make(dtype: torch.dtype) -> Sample:
        draw = _Draw(dtype, 1, 1, D, 4, "D")
        arguments = draw.signal()[:, 0], draw.normal(D, 4), draw.normal(D)
        return sample(*arguments, state=draw.normal(1, D, 4), activation="silu")

    return BenchCase(
        name=f"B1 D{D} W4 silu",
        make=make,
        flops=D * 28.0,
        bytes=D * 4.0 * (2 + 8 + 4),
        backward=False,
    )


SPECS = [
    OpSpec(
        name="causal_conv1d",
        family="causal_conv1d",
        function=causal_conv1d,
        reference=reference.causal_conv1d,
        samples=_samples,
        tolerances=_TOLERANCES,
        differentiable=("x", "weight", "bias", "residual", "initial_state"),
        gradcheck=_gradcheck,
        bad_inputs=_BAD_INPUTS,
        sums_by_order=("gradients",),
        time=("x", "residual"),
        step=causal_conv1d_update,
        bench=[_bench(T, D, order) for T, D in ((2048, 2048), (4096, 4096)) for order in "DT"],
        peers=(
            conv1d.COPY,
            conv1d.DEPTHWISE,
        ),
    ),
    OpSpec(
        name="causal_conv1d_update",
        family="causal_conv1d",
        function=causal_conv1d_update,
        reference=reference.causal_conv1d_update,
        samples=_update_samples,
        tolerances=_TOLERANCES,
        mutates=("state",),
        bad_inputs=_BAD_UPDATES,
        bench=(_update_bench(2048), _update_bench(8192)),
        peers=(conv1d.UPDATE,),
    ),
]
