"""Specs of the decoding family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights.ops.attention.state import HybridState
from fastweights.ops.decoding import functional, reference
from fastweights.ops.quantization.functional import quantize
from fastweights.testing.opspec import BadInput, BenchCase, OpSpec, Sample, Tolerance, sample


def _call(
    rows: int,
    *,
    layers: int = 2,
    width: int = 40,
    heads: int = 4,
    kv_heads: int = 2,
    state_heads: int = 2,
    dim: int = 6,
    columns: int = 5,
    window: int = 4,
    intermediate: int = 50,
    vocab: int = 37,
    extras: bool = True,
    activation: str = "float",
    group_size: int = 32,
) -> Sample:
    """`extras`: biases, norms of q and k, decay, sink and gains."""
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * size

    def weight(out_features: int, in_features: int, format: str = "int4") -> Tensor:
        scaled = random(out_features, in_features, size=in_features**-0.5)
        return quantize(scaled, format, group_size=group_size).packed

    def optional(*shape: int, size: float = 0.3) -> Tensor:
        return random(*shape, size=size) if extras else torch.empty(0)

    query, key = heads * dim, kv_heads * dim
    outputs = (query, key, key, width, intermediate, intermediate, width)
    inputs = (width, width, width, query, width, width, intermediate)
    lists: dict[str, list[Tensor]] = {
        n: [] for n in ("weights", "biases", "norms", "maps", "states")
    }
    for _ in range(layers):
        lists["weights"] += [weight(n, k) for n, k in zip(outputs, inputs, strict=True)]
        lists["biases"] += [optional(n) for n in outputs] if extras else []
        lists["norms"] += [1 + random(width, size=0.1), 1 + random(width, size=0.1)]
        lists["norms"] += [1 + optional(dim) if extras else optional(dim) for _ in range(2)]
        lists["maps"] += [
            random(heads, dim, columns),
            random(state_heads, dim, columns),
            random(heads).sigmoid(),
            optional(state_heads, 2 * columns).sigmoid() if extras else torch.empty(0),
            optional(heads, dim + 1),
            optional(heads, dim + 1),
            optional(state_heads, dim + 1),
        ]
        lists["states"] += _state(rows, window, kv_heads, state_heads, dim, 2 * columns, random)
    return sample(
        random(rows, width), *lists.values(), torch.ones(width), weight(vocab, width, "int8"),
        10000 ** -torch.linspace(0, 0.9, dim // 2),
        intermediate=intermediate, vocab=vocab, rotated_features=not extras, rotary_factor=1.0,
        scale=dim**-0.5, norm_eps=1e-5, format="int4", group_size=group_size, head_format="int8",
        head_group_size=group_size, activation=activation,
    )  # fmt: skip


def _state(
    rows: int, window: int, kv_heads: int, state_heads: int, dim: int, features: int, random: Any
) -> list[Tensor]:
    """A state some way on, the rows at different positions: rings not yet full, just full, old."""
    state = HybridState.zeros(
        rows, window=window, kv_heads=kv_heads, feature_heads=state_heads, state_heads=state_heads,
        key_dim=dim, value_dim=dim, feature_dim=features,
    )  # fmt: skip
    state.position.copy_(torch.tensor([0, window - 1, window, 1001, 30][:rows]).resize_(rows))
    for tensor in (state.k, state.v):
        tensor.copy_(random(*tensor.shape))
    seen = (state.position > window)[:, None, None]
    state.kf.copy_(random(*state.kf.shape).abs())
    state.z.copy_(random(*state.z.shape).abs() * seen)
    state.S.copy_(random(*state.S.shape) * seen[..., None])
    return list(state.tensors())


def _samples(dtype: torch.dtype) -> list[Sample]:
    return [
        _call(1),
        _call(4, state_heads=4, extras=False),
        _call(3, heads=2, kv_heads=2, dim=40, columns=33, window=3, layers=1),
        _call(0, layers=1),
    ]


def _bench(dtype: torch.dtype) -> Sample:
    """Four layers of SmolLM2-135M and a tenth of its vocabulary."""
    return _call(
        1, layers=4, width=576, heads=9, kv_heads=3, state_heads=3, dim=64, columns=64, window=64,
        intermediate=1536, vocab=4915, activation="int8", group_size=64,
    )  # fmt: skip


_BENCH_WEIGHTS = 4 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
_BENCH_STATES = 4 * 3 * 64 * (128 + 2 * 64) * 4 * 2


def _with(**changes: Any) -> Any:
    """The op called with one argument changed: its value, or a function of the old one."""

    def call() -> object:
        arguments = SPECS[0].bind(_call(1))
        for name, change in changes.items():
            arguments[name] = change(arguments[name]) if callable(change) else change
        return functional.decode_step(**arguments)

    return call


def _refused(message: str, **changes: Any) -> BadInput:
    return BadInput(_with(**changes), RuntimeError, f"decode_step: expected {message}")


SPECS = [
    OpSpec(
        name="decode_step",
        family="decoding",
        function=functional.decode_step,
        reference=reference.decode_step,
        samples=_samples,
        tolerances={torch.float32: Tolerance(output=2e-4, gradient=0.0)},
        mutates=("states",),
        bad_inputs=[
            _refused(r"x of shape \[B, D\]", x=lambda x: x[0]),
            _refused("x of dtype float32", x=lambda x: x.double()),
            _refused(r"packed of shape", x=torch.zeros(1, 300)),
            _refused(r"norms of shape \[D\] = \[40\]", norms=lambda t: [t[0][1:], *t[1:]]),
            _refused("7 weights for each of 1 layers", weights=lambda w: w[:-1]),
            _refused("at least one layer", weights=[]),
            _refused("packed of shape", weights=lambda w: [w[1], *w[1:]]),
            _refused("6 states for each", states=lambda s: s[:-1]),
            _refused(r"states of shape \[B, HKV, w, K\]", states=lambda s: [s[0], s[2], *s[2:]]),
            _refused("states with 0 <= position", states=lambda s: [*s[:5], s[5] - 9, *s[6:]]),
            _refused(r"maps of shape \[HQ\]", maps=lambda m: [*m[:2], m[2][1:], *m[3:]]),
            _refused("packed of shape", vocab=999),
            _refused("format in int4, int8, ", format="int7"),
            _refused("activation int8 or float", activation="int2"),
        ],
        bench=[
            BenchCase(
                "4 layers of SmolLM2-135M, B1",
                make=_bench,
                flops=2 * (_BENCH_WEIGHTS + 4915 * 576) + 4 * 9 * 128 * 64 * 4,
                bytes=_BENCH_WEIGHTS * 4.5 / 8 + 4915 * 576 * 8.5 / 8 + _BENCH_STATES,
            )
        ],
        oracle_dtype=None,
    )
]
