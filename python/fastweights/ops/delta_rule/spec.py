"""The ops of this family, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastweights.ops.delta_rule import reference
from fastweights.ops.delta_rule.functional import delta_rule, delta_rule_step
from fastweights.testing.bad_recurrences import bad_recurrence_inputs
from fastweights.testing.opspec import BadInput, BenchCase, OpSpec, Sample, Tolerance, sample
from fastweights.testing.peers import delta_rule as peers

_GATES = {"none": (), "head": ("HV",), "token": ("B", "T", "HV"), "channel": ("B", "T", "HV", "K")}


class _Draw:
    """Seeded arguments: keys of about unit length, so that no state grows."""

    def __init__(self, dtype: torch.dtype, **sizes: int) -> None:
        self.sizes = sizes
        self.generator = torch.Generator().manual_seed(sizes["T"] + sizes["K"])
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(self, *shape: str) -> Tensor:
        sizes = tuple(self.sizes[letter] for letter in shape)
        return torch.randn(sizes, generator=self.generator, dtype=torch.float64)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        q = self.normal("B", "T", "H", "K")
        k = self.normal("B", "T", "H", "K") * max(self.sizes["K"], 1) ** -0.5
        v = self.normal("B", "T", "HV", "V")
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)

    def beta(self) -> Tensor:
        return self.normal("B", "T", "HV").sigmoid().to(self.wide)

    def gate(self, kind: str) -> Tensor:
        return (self.normal(*_GATES[kind]).abs() * -0.3).to(self.wide)

    def raw(self, *shape: str) -> Tensor:
        return self.normal(*shape).to(self.wide)

    def erase(self) -> Tensor:
        return self.normal("B", "T", "HV", "K").sigmoid().to(self.dtype)

    def write(self) -> Tensor:
        return self.normal("B", "T", "HV", "V").sigmoid().to(self.dtype)

    def state(self, sequences: int | None = None, *, v_first: bool = False) -> Tensor:
        self.sizes["N"] = self.sizes["B"] if sequences is None else sequences
        rows, columns = ("V", "K") if v_first else ("K", "V")
        return self.raw("N", "HV", rows, columns)


def _samples(dtype: torch.dtype) -> Sequence[Sample]:
    plain = _Draw(dtype, B=1, T=67, H=1, HV=1, K=4, V=5)
    head = _Draw(dtype, B=2, T=19, H=1, HV=2, K=9, V=3)
    token = _Draw(dtype, B=1, T=35, H=2, HV=2, K=8, V=12)
    packed = _Draw(dtype, B=1, T=40, H=1, HV=2, K=5, V=9)
    channel = _Draw(dtype, B=1, T=66, H=1, HV=1, K=17, V=70)
    raw = _Draw(dtype, B=1, T=34, H=1, HV=2, K=6, V=7)
    bounded = _Draw(dtype, B=1, T=18, H=1, HV=1, K=19, V=66)
    single = _Draw(dtype, B=1, T=1, H=1, HV=1, K=3, V=3)
    empty = _Draw(dtype, B=2, T=0, H=1, HV=1, K=3, V=4)
    return [
        sample(*plain.qkv(), beta=plain.beta(), output_final_state=True),
        sample(
            *head.qkv(),
            beta=head.beta(),
            g=head.gate("head"),
            scale=0.5,
            initial_state=head.state(),
            output_final_state=True,
        ),
        sample(
            *token.qkv(),
            beta=token.beta(),
            g=token.gate("token"),
            qk_l2norm=True,
            initial_state=token.state(v_first=True),
            output_final_state=True,
            state_v_first=True,
        ),
        sample(
            *packed.qkv(),
            beta=packed.beta(),
            g=packed.gate("channel"),
            erase=packed.erase(),
            write=packed.write(),
            initial_state=packed.state(5),
            output_final_state=True,
            cu_seqlens=torch.tensor([0, 0, 3, 20, 20, 40]),
        ),
        sample(
            *channel.qkv(),
            g=channel.gate("channel"),
            erase=channel.erase(),
            qk_l2norm=True,
            initial_state=channel.state(),
            output_final_state=True,
        ),
        sample(
            *raw.qkv(),
            beta=raw.raw("B", "T", "HV"),
            g=raw.raw("B", "T", "HV"),
            qk_l2norm=True,
            A_log=raw.raw("HV"),
            dt_bias=raw.raw("HV"),
            beta_sigmoid=True,
            allow_neg_eigval=True,
            output_final_state=True,
        ),
        sample(
            *bounded.qkv(),
            beta=bounded.raw("B", "T", "HV"),
            g=bounded.raw("B", "T", "HV", "K"),
            write=bounded.write(),
            A_log=bounded.raw("HV"),
            dt_bias=bounded.raw("HV", "K"),
            lower_bound=-3.0,
            beta_sigmoid=True,
            output_final_state=True,
        ),
        sample(*single.qkv()),
        sample(
            *empty.qkv(),
            beta=empty.beta(),
            g=empty.gate("channel"),
            initial_state=empty.state(),
            output_final_state=True,
        ),
    ]


def _gradcheck() -> Sequence[Sample]:
    def draw(K: int = 3) -> _Draw:
        return _Draw(torch.float64, B=1, T=67, H=1, HV=2, K=K, V=4)

    plain, head, token, channel, packed = draw(), draw(4), draw(5), draw(3), draw(4)
    return [
        sample(*plain.qkv(), beta=plain.beta(), initial_state=plain.state()),
        sample(
            *head.qkv(), beta=head.beta(), g=head.gate("head"), output_final_state=True, scale=1.0
        ),
        sample(
            *token.qkv(),
            beta=token.raw("B", "T", "HV"),
            g=token.raw("B", "T", "HV"),
            qk_l2norm=True,
            A_log=token.raw("HV"),
            dt_bias=token.raw("HV"),
            beta_sigmoid=True,
            allow_neg_eigval=True,
            initial_state=token.state(),
            output_final_state=True,
        ),
        sample(
            *channel.qkv(),
            beta=channel.beta(),
            g=channel.raw("B", "T", "HV", "K"),
            erase=channel.erase(),
            write=channel.write(),
            qk_l2norm=True,
            A_log=channel.raw("HV"),
            dt_bias=channel.raw("HV", "K"),
            lower_bound=-2.0,
            initial_state=channel.state(),
            output_final_state=True,
        ),
        sample(
            *packed.qkv(),
            g=packed.raw("B", "T", "HV", "K"),
            A_log=packed.raw("HV"),
            initial_state=packed.state(3, v_first=True),
            output_final_state=True,
            state_v_first=True,
            cu_seqlens=torch.tensor([0, 49, 49, 67]),
        ),
    ]


def _step_samples(dtype: torch.dtype) -> Sequence[Sample]:
    def call(draw: _Draw, names: str, **options: Any) -> Sample:
        made = {
            "beta": draw.beta,
            "token": lambda: draw.gate("token"),
            "channel": lambda: draw.gate("channel"),
            "erase": draw.erase,
            "write": draw.write,
        }
        timed = {
            ("g" if name in _GATES else name): made[name]()[:, 0]
            for name in names.split()
            if name in made
        }
        state = draw.state()
        return sample(*(x[:, 0] for x in draw.qkv()), **timed, state=state, **options)

    head = _Draw(dtype, B=2, T=1, H=2, HV=4, K=8, V=16)
    raw = _Draw(dtype, B=1, T=1, H=1, HV=2, K=7, V=20)
    return [
        call(_Draw(dtype, B=2, T=1, H=2, HV=4, K=5, V=19), "beta"),
        call(head, "beta", g=head.gate("head"), qk_l2norm=True),
        call(_Draw(dtype, B=1, T=1, H=2, HV=2, K=7, V=3), "beta token", scale=0.3),
        call(_Draw(dtype, B=3, T=1, H=1, HV=2, K=9, V=33), "channel erase write"),
        call(
            raw,
            "beta token",
            A_log=raw.raw("HV"),
            dt_bias=raw.raw("HV"),
            beta_sigmoid=True,
        ),
        call(_Draw(dtype, B=0, T=1, H=1, HV=2, K=4, V=4), ""),
    ]


_TOLERANCES = {
    torch.float32: Tolerance(1e-5, 1e-4),
    torch.bfloat16: Tolerance(1e-2, 4e-2),
    torch.float16: Tolerance(2e-3, 1e-2),
    torch.float64: Tolerance(1e-12, 1e-10),
}

_Q = torch.rand(2, 5, 2, 4)
_ONE = torch.rand(2, 2, 4)
_S = torch.zeros(2, 2, 4, 4)
_RAW = torch.ops.fastweights


def _raw(q: Tensor, k: Tensor, v: Tensor, *optional: Tensor | None, **options: Any) -> object:
    given: dict[str, Any] = {
        "scale": 1.0,
        "qk_l2norm": False,
        "lower_bound": None,
        "beta_range": 0.0,
        "output_final_state": False,
        "state_v_first": False,
        "keep_states": False,
        "form": "auto",
    }
    missing = [None] * (8 - len(optional))
    result: object = _RAW.delta_rule(q, k, v, *optional, *missing, **given | options)
    return result


_BAD_INPUTS = (
    *bad_recurrence_inputs(delta_rule),
    BadInput(
        lambda: delta_rule(_Q, _Q, _Q, beta=_Q[:, :, 0, 0]),
        RuntimeError,
        r"expected beta of shape \[B, T, HV\] = \[2, 5, 2\] \(from q and v\), got \[2, 5\]",
    ),
    BadInput(
        lambda: delta_rule(_Q, _Q, _Q, beta=_Q[:, :, :1, 0]),
        RuntimeError,
        r"expected beta of shape \[B, T, HV\] = \[2, 5, 2\] \(from q and v\), got \[2, 5, 1\]",
    ),
    BadInput(
        lambda: delta_rule(_Q, _Q, _Q, erase=_Q[..., :3]),
        RuntimeError,
        r"expected erase of shape \[B, T, HV, K\] = \[2, 5, 2, 4\]",
    ),
    BadInput(
        lambda: delta_rule(_Q, _Q, _Q, write=_Q[..., :3]),
        RuntimeError,
        r"expected write of shape \[B, T, HV, V\] = \[2, 5, 2, 4\]",
    ),
    BadInput(
        lambda: delta_rule(_Q, _Q, _Q, A_log=torch.zeros(2)),
        RuntimeError,
        r"expected g of shape \[B, T, HV\] or \[B, T, HV, K\] with A_log or lower_bound, got None",
    ),
    BadInput(
        lambda: delta_rule(_Q, _Q, _Q, g=_Q[..., 0], A_log=torch.zeros(3)),
        RuntimeError,
        r"expected A_log of shape \[HV\] = \[2\] \(from v\), got \[3\]",
    ),
    BadInput(
        lambda: delta_rule(_Q, _Q, _Q, g=_Q, lower_bound=-5.0, dt_bias=torch.zeros(8)),
        RuntimeError,
        r"expected dt_bias of shape \[HV, K\] = \[2, 4\] \(from q and v\), got \[8\]",
    ),
    BadInput(
        lambda: delta_rule(_Q, _Q, _Q, g=_Q[..., 0], dt_bias=torch.zeros(2)),
        RuntimeError,
        r"expected A_log or lower_bound with dt_bias, got neither",
    ),
    BadInput(
        lambda: delta_rule(_Q, _Q, _Q, beta_sigmoid=True),
        RuntimeError,
        r"expected beta with a sigmoid, got None",
    ),
    BadInput(
        lambda: delta_rule(_Q, _Q, _Q, beta=_Q[..., 0], allow_neg_eigval=True),
        ValueError,
        r"expected beta_sigmoid with allow_neg_eigval, got False",
    ),
    BadInput(lambda: _raw(_Q, _Q[:, :4], _Q), RuntimeError, r"expected k of shape"),
    BadInput(lambda: _raw(_Q, _Q, _Q, form="fast"), RuntimeError, r"expected form of auto"),
)

_BAD_STEPS = (
    BadInput(
        lambda: delta_rule_step(_ONE, _ONE, _ONE, state=torch.zeros(2, 2, 4, 3)),
        RuntimeError,
        r"delta_rule_step: expected state of shape \[B, HV, K, V\] = \[2, 2, 4, 4\]",
    ),
    BadInput(
        lambda: delta_rule_step(_ONE, _ONE, _ONE, state=_S.mT),
        RuntimeError,
        r"expected state with a contiguous last dimension",
    ),
    BadInput(
        lambda: delta_rule_step(_ONE, _ONE, _ONE, beta=_ONE[0], state=_S),
        RuntimeError,
        r"expected beta of shape \[B, HV\] = \[2, 2\] \(from q and v\), got \[2, 4\]",
    ),
    BadInput(
        lambda: delta_rule_step(_ONE, _ONE, _ONE, g=_ONE[..., 0][:, :1], state=_S),
        RuntimeError,
        r"expected g of shape \[B, HV\] = \[2, 2\]",
    ),
    BadInput(
        lambda: delta_rule_step(_ONE, _ONE, _ONE, state=_S.double()),
        RuntimeError,
        r"expected state of dtype float32, got float64",
    ),
    BadInput(
        lambda: delta_rule_step(_ONE, _ONE[:1], _ONE, state=_S),
        RuntimeError,
        r"expected k of shape \[B, H, K\] = \[2, 2, 4\] \(from q\), got \[1, 2, 4\]",
    ),
)


def _bench(kind: str, T: int, D: int) -> BenchCase:
    chunk = 16 if kind == "channel" else 32
    rows = 8 * T

    def make(dtype: torch.dtype) -> Sample:
        draw = _Draw(dtype, B=1, T=T, H=8, HV=8, K=D, V=D)
        g = None if kind == "none" else draw.gate(kind)
        return sample(*draw.qkv(), beta=draw.beta(), g=g, qk_l2norm=True)

    return BenchCase(
        name=f"B1 H8 T{T} D{D} gate {kind}",
        make=make,
        flops=rows * (6.0 * D * D + chunk * 4 * D),
        bytes=rows * 4.0 * (4 * D + (D if kind == "channel" else 0)),
        rows=rows,
        dtypes=(torch.float32, torch.bfloat16) if kind == "token" else (torch.float32,),
        reference=False,
    )


def _step_bench(kind: str, B: int, D: int) -> BenchCase:
    def make(dtype: torch.dtype) -> Sample:
        draw = _Draw(dtype, B=B, T=1, H=8, HV=8, K=D, V=D)
        q, k, v = (x[:, 0] for x in draw.qkv())
        beta, g = draw.beta()[:, 0], draw.gate(kind)[:, 0]
        return sample(q, k, v, beta=beta, g=g, state=torch.zeros(B, 8, D, D), qk_l2norm=True)

    rows = 8 * B
    return BenchCase(
        name=f"B{B} H8 D{D} gate {kind}",
        make=make,
        flops=rows * 7.0 * D * D,
        bytes=rows * 8.0 * D * D,
        rows=rows,
        backward=False,
        reference=False,
    )


SPECS = [
    OpSpec(
        name="delta_rule",
        family="delta_rule",
        function=delta_rule,
        reference=reference.delta_rule,
        samples=_samples,
        tolerances=_TOLERANCES,
        differentiable=(
            "q",
            "k",
            "v",
            "beta",
            "g",
            "erase",
            "write",
            "A_log",
            "dt_bias",
            "initial_state",
        ),
        forms={"recurrent": {"_form": "recurrent"}, "chunked": {"_form": "chunked"}},
        gradcheck=_gradcheck,
        bad_inputs=_BAD_INPUTS,
        time=("q", "k", "v", "beta", "g", "erase", "write"),
        step=delta_rule_step,
        bench=(
            *(_bench(kind, 2048, 128) for kind in ("none", "token", "channel")),
            *(_bench(kind, 4096, 64) for kind in ("token", "channel")),
        ),
        peers=(peers.GATED, peers.KDA),
    ),
    OpSpec(
        name="delta_rule_step",
        family="delta_rule",
        function=delta_rule_step,
        reference=reference.delta_rule_step,
        samples=_step_samples,
        tolerances=_TOLERANCES,
        mutates=("state",),
        bad_inputs=_BAD_STEPS,
        # The last exceeds the caches, so that memory decides.
        bench=(
            _step_bench("token", 1, 128),
            _step_bench("channel", 1, 128),
            _step_bench("token", 512, 128),
        ),
        peers=(peers.GATED_STEP, peers.KDA_STEP),
    ),
]
