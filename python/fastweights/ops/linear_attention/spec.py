"""The ops of this family, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastweights.ops.linear_attention import reference
from fastweights.ops.linear_attention.functional import linear_attention, linear_attention_step
from fastweights.testing.bad_recurrences import bad_recurrence_inputs
from fastweights.testing.opspec import BadInput, BenchCase, OpSpec, Sample, Tolerance, sample
from fastweights.testing.peers import sdpa

_GATES = {"none": None, "head": 1, "token": 3, "channel": 4}  # rank of g


class _Draw:
    """Seeded arguments: positive q and k, so that a normaliser never crosses zero."""

    def __init__(self, dtype: torch.dtype, B: int, T: int, H: int, HV: int, K: int, V: int) -> None:
        self.generator = torch.Generator().manual_seed(T + K)
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.B, self.T, self.H, self.HV, self.K, self.V = B, T, H, HV, K, V

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        q = self.uniform(self.B, self.T, self.H, self.K)
        k = self.uniform(self.B, self.T, self.H, self.K)
        v = self.uniform(self.B, self.T, self.HV, self.V) * 2 - 1
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)

    def gate(self, kind: str) -> Tensor | None:
        shape = (self.B, self.T, self.HV, self.K)[: _GATES[kind]] if _GATES[kind] else ()
        shape = (self.HV,) if kind == "head" else shape
        return None if kind == "none" else (self.uniform(*shape) * -0.5).to(self.wide)

    def state(self, sequences: int, *, z: bool = False, v_first: bool = False) -> Any:
        rows, columns = (self.V, self.K) if v_first else (self.K, self.V)
        S = self.uniform(sequences, self.HV, rows, columns).to(self.wide)
        return (S, self.uniform(sequences, self.HV, self.K).to(self.wide)) if z else S


def _samples(dtype: torch.dtype) -> Sequence[Sample]:
    plain = _Draw(dtype, 1, 67, 1, 1, 4, 5)
    head = _Draw(dtype, 2, 19, 1, 2, 9, 3)
    token = _Draw(dtype, 1, 35, 2, 2, 8, 12)
    packed = _Draw(dtype, 1, 40, 1, 2, 5, 9)
    channel = _Draw(dtype, 1, 66, 1, 1, 17, 40)
    single = _Draw(dtype, 1, 1, 1, 1, 3, 3)
    empty = _Draw(dtype, 2, 0, 1, 1, 3, 4)
    return [
        sample(*plain.qkv(), output_final_state=True),
        sample(
            *head.qkv(),
            head.gate("head"),
            scale=0.5,
            normalize=True,
            initial_state=head.state(2, z=True),
            output_final_state=True,
        ),
        sample(
            *token.qkv(),
            token.gate("token"),
            initial_state=token.state(1, v_first=True),
            output_final_state=True,
            state_v_first=True,
            reverse=True,
        ),
        sample(
            *packed.qkv(),
            packed.gate("channel"),
            normalize=True,
            initial_state=packed.state(5, z=True),
            output_final_state=True,
            cu_seqlens=torch.tensor([0, 0, 3, 20, 20, 40]),
        ),
        sample(
            *channel.qkv(),
            channel.gate("channel"),
            initial_state=channel.state(1),
            output_final_state=True,
        ),
        # A single token without eps has no gradient to q and k but rounding errors.
        sample(*single.qkv(), normalize=True, eps=0.5),
        sample(
            *empty.qkv(),
            empty.gate("channel"),
            initial_state=empty.state(2),
            output_final_state=True,
        ),
    ]


def _gradcheck() -> Sequence[Sample]:
    calls = []
    for kind in _GATES:
        draw = _Draw(torch.float64, 1, 67, 1, 2, 3, 4)
        calls.append(
            sample(
                *draw.qkv(),
                draw.gate(kind),
                normalize=True,
                initial_state=draw.state(1, z=True),
                output_final_state=True,
            )
        )
    return calls


def _step_samples(dtype: torch.dtype) -> Sequence[Sample]:
    def call(draw: _Draw, kind: str, **options: Any) -> Sample:
        q, k, v = (x[:, 0] for x in draw.qkv())
        g = draw.gate(kind)
        g = g if g is None or kind == "head" else g[:, 0]
        state = draw.state(draw.B, z=options.get("normalize", False))
        return sample(q, k, v, g, state=state, **options)

    return [
        call(_Draw(dtype, 2, 1, 2, 4, 5, 19), "none"),
        call(_Draw(dtype, 2, 1, 2, 4, 8, 16), "head", normalize=True),
        call(_Draw(dtype, 1, 1, 2, 2, 7, 3), "token", scale=0.3),
        call(_Draw(dtype, 3, 1, 1, 2, 9, 33), "channel", normalize=True),
        call(_Draw(dtype, 0, 1, 1, 2, 4, 4), "none"),
    ]


_TOLERANCES = {
    torch.float32: Tolerance(1e-5, 1e-4),
    torch.bfloat16: Tolerance(1e-2, 4e-2),
    torch.float16: Tolerance(2e-3, 1e-2),
    torch.float64: Tolerance(1e-12, 1e-10),
}

_Q = torch.rand(2, 5, 2, 4)
_RAW = torch.ops.fastweights
_OPTIONS: dict[str, Any] = {
    "scale": 1.0,
    "normalize": False,
    "eps": 0.0,
    "output_final_state": False,
    "state_v_first": False,
    "reverse": False,
    "keep_states": False,
    "form": "auto",
}


def _raw(q: Tensor, k: Tensor, v: Tensor, *optional: Tensor | None, **options: Any) -> object:
    missing = [None] * (4 - len(optional))
    result: object = _RAW.linear_attention(q, k, v, *optional, *missing, **_OPTIONS | options)
    return result


_BAD_INPUTS = (
    *bad_recurrence_inputs(linear_attention),
    BadInput(
        lambda: linear_attention(_Q, _Q, _Q, initial_state=(_Q, _Q)),
        TypeError,
        r"expected initial_state to be a tensor without normalize",
    ),
    BadInput(lambda: _raw(_Q, _Q[:, :4], _Q), RuntimeError, r"expected k of shape"),
    BadInput(lambda: _raw(_Q, _Q, _Q, _Q[..., :3]), RuntimeError, r"expected g of shape"),
    BadInput(lambda: _raw(_Q, _Q, _Q, form="fast"), RuntimeError, r"expected form of auto"),
    BadInput(
        lambda: _raw(_Q, _Q, _Q, None, None, torch.zeros(2, 2, 4)),
        RuntimeError,
        r"expected initial_state without z unless normalize",
    ),
)

_ONE = torch.rand(2, 2, 4)
_BAD_STEPS = (
    BadInput(
        lambda: linear_attention_step(_ONE, _ONE, _ONE, state=torch.zeros(2, 2, 4, 3)),
        RuntimeError,
        r"linear_attention_step: expected state of shape \[B, HV, K, V\] = \[2, 2, 4, 4\]",
    ),
    BadInput(
        lambda: linear_attention_step(_ONE, _ONE, _ONE, state=torch.zeros(2, 2, 4, 4).mT),
        RuntimeError,
        r"expected state with a contiguous last dimension",
    ),
    BadInput(
        lambda: linear_attention_step(_ONE, _ONE, _ONE, _ONE[0], state=torch.zeros(2, 2, 4, 4)),
        RuntimeError,
        r"expected g of shape \[B, HV\] = \[2, 2\] \(from v\), got \[2, 4\]",
    ),
    BadInput(
        lambda: linear_attention_step(
            _ONE, _ONE, _ONE, state=torch.zeros(2, 2, 4, 4), normalize=True
        ),
        TypeError,
        r"expected state to be the pair \(S, z\) with normalize",
    ),
    BadInput(
        lambda: _RAW.linear_attention_step(
            _ONE, _ONE[:1], _ONE, None, torch.zeros(2, 2, 4, 4), None, scale=1.0, eps=0.0
        ),
        RuntimeError,
        r"expected k of shape \[B, H, K\] = \[2, 2, 4\] \(from q\), got \[1, 2, 4\]",
    ),
)


def _bench(kind: str, T: int, D: int, *, backward: bool = True, **options: Any) -> BenchCase:
    chunk = 16 if kind == "channel" else 32
    rows = 8 * T

    def make(dtype: torch.dtype) -> Sample:
        draw = _Draw(dtype, 1, T, 8, 8, D, D)
        return sample(*draw.qkv(), draw.gate(kind), **options)

    suffix = " normalize" if options.get("normalize") else ""
    return BenchCase(
        name=f"B1 H8 T{T} D{D} gate {kind}{suffix}",
        make=make,
        flops=rows * (4.0 * D * D + (chunk + 1) * 2 * D),
        bytes=rows * 4.0 * (4 * D + (D if kind == "channel" else 0)),
        rows=rows,
        backward=backward,
        reference=False,
    )


def _step_bench(D: int) -> BenchCase:
    """256 MiB of states: they exceed the caches, so that memory decides."""
    B = 2**26 // (8 * D * D)

    def make(dtype: torch.dtype) -> Sample:
        draw = _Draw(dtype, B, 1, 8, 8, D, D)
        q, k, v = (x[:, 0] for x in draw.qkv())
        return sample(q, k, v, draw.gate("head"), state=torch.zeros(B, 8, D, D))

    rows = 8 * B
    return BenchCase(
        name=f"B{B} H8 D{D} gate head",
        make=make,
        flops=rows * 5.0 * D * D,
        bytes=rows * 8.0 * D * D,
        rows=rows,
        backward=False,
        reference=False,
    )


SPECS = [
    OpSpec(
        name="linear_attention",
        family="linear_attention",
        function=linear_attention,
        reference=reference.linear_attention,
        samples=_samples,
        tolerances=_TOLERANCES,
        differentiable=("q", "k", "v", "g", "initial_state"),
        forms={"recurrent": {"_form": "recurrent"}, "chunked": {"_form": "chunked"}},
        gradcheck=_gradcheck,
        bad_inputs=_BAD_INPUTS,
        time=("q", "k", "v", "g"),
        step=linear_attention_step,
        bench=(
            *(_bench(kind, 4096, D) for D in (64, 128) for kind in _GATES),
            *(_bench("none", 4096, D, normalize=True) for D in (64, 128)),
            *(_bench("none", T, 64, backward=False) for T in (2048, 32768)),
        ),
        peers=(sdpa.CAUSAL,),
    ),
    OpSpec(
        name="linear_attention_step",
        family="linear_attention",
        function=linear_attention_step,
        reference=reference.linear_attention_step,
        samples=_step_samples,
        tolerances=_TOLERANCES,
        mutates=("state",),
        bad_inputs=_BAD_STEPS,
        bench=(_step_bench(64), _step_bench(128)),
    ),
]
