"""The ops of this family, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights.ops.attention import functional, reference
from fastweights.ops.attention.state import HybridState, Layout
from fastweights.testing import BadInput, BenchCase, OpSpec, Peer, Sample, Tolerance, sample

_TOLERANCES = {
    torch.float32: Tolerance(output=2e-5, gradient=2e-4),
    torch.bfloat16: Tolerance(output=2e-2, gradient=4e-2),
    torch.float16: Tolerance(output=3e-3, gradient=1e-2),
    torch.float64: Tolerance(output=1e-11, gradient=1e-9),
}


def _qkv(
    dtype: torch.dtype, B: int, T: int, HQ: int, HKV: int, K: int, V: int, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T, HQ, K), (B, T, HKV, K), (B, T, HKV, V)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _hybrid(
    dtype: torch.dtype,
    B: int,
    T: int,
    HQ: int,
    HKV: int,
    HF: int,
    *,
    K: int = 5,
    V: int = 6,
    F: int = 7,
    decay: tuple[int, ...] | None = None,
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    features = [torch.rand(B, T, H, F, generator=generator).to(dtype) for H in (HQ, HF)]
    mix = 0.1 + 0.8 * torch.rand(HQ, generator=generator).to(state)
    g = None if decay is None else -torch.rand(decay, generator=generator).to(state)
    return [*_qkv(dtype, B, T, HQ, HKV, K, V), *features, mix, g]


def _state(
    dtype: torch.dtype, B: int, positions: list[int], *, window: int, layout: Layout, **sizes: int
) -> HybridState:
    generator = torch.Generator().manual_seed(2)
    state = HybridState.zeros(
        B, window=window, layout=layout, kv_heads=2, feature_heads=sizes["HF"],
        state_heads=sizes["HS"], key_dim=5, value_dim=6, feature_dim=7,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )  # fmt: skip
    for x in (state.k, state.v, state.kf, state.S, state.z):
        x.copy_(torch.rand(x.shape, generator=generator))
    state.position.copy_(torch.tensor(positions, dtype=torch.int64))
    return state


def _window_samples(dtype: torch.dtype) -> list[Sample]:
    packed = torch.tensor([0, 11, 11, 45], dtype=torch.int32)
    return [
        sample(*_qkv(dtype, 2, 45, 4, 2, 5, 6), window=7, return_lse=True),
        sample(*_qkv(dtype, 1, 70, 2, 2, 8, 16), window=100),
        sample(*_qkv(dtype, 1, 45, 2, 1, 5, 6), window=4, causal=False, return_lse=True),
        sample(*_qkv(dtype, 1, 45, 2, 2, 3, 17), window=1, scale=0.5, cu_seqlens=packed),
        sample(*_qkv(dtype, 1, 300, 1, 1, 4, 4), window=140),
        sample(*_qkv(dtype, 2, 0, 2, 2, 5, 6), window=3, return_lse=True),
    ]


def _hybrid_samples(dtype: torch.dtype) -> list[Sample]:
    packed = torch.tensor([0, 11, 11, 45])
    return [
        sample(*_hybrid(dtype, 2, 45, 4, 2, 2), window=5, output_final_state=True),
        sample(*_hybrid(dtype, 1, 70, 4, 2, 4, decay=(4,)), window=9),
        sample(*_hybrid(dtype, 1, 45, 4, 2, 2, decay=(1, 45, 4)), window=1),
        sample(*_hybrid(dtype, 1, 45, 4, 2, 4, decay=(1, 45, 2)), window=7, layout="terraced"),
        sample(*_hybrid(dtype, 1, 45, 4, 2, 2), window=4, cu_seqlens=packed, scale=0.3),
        sample(
            *_hybrid(dtype, 2, 37, 4, 2, 4, decay=(4,)), window=6, output_final_state=True,
            initial_state=_state(dtype, 2, [3, 17], window=6, layout="sliding", HF=4, HS=4),
        ),
        sample(
            *_hybrid(dtype, 2, 37, 4, 2, 2), window=6, layout="terraced", output_final_state=True,
            initial_state=_state(dtype, 2, [3, 17], window=6, layout="terraced", HF=2, HS=2),
        ),
        sample(
            *_hybrid(dtype, 1, 70, 4, 2, 2, decay=(2, 7)), window=9, sink=_sink(dtype, 1, 70),
            output_final_state=True,
        ),
        sample(*_hybrid(dtype, 2, 45, 4, 2, 4, decay=(4, 7)), window=4, layout="terraced"),
        sample(*_hybrid(dtype, 1, 0, 4, 2, 2), window=3, output_final_state=True),
    ]  # fmt: skip


def _sink(dtype: torch.dtype, B: int, T: int) -> Tensor:
    """Scores of the sink, some of them above and some below those of the window."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return 2 * torch.randn(B, T, 4, generator=torch.Generator().manual_seed(4)).to(state)


def _step_sample(dtype: torch.dtype, layout: Layout, decay: tuple[int, ...] | None) -> Sample:
    tokens: list[Any] = _hybrid(dtype, 2, 1, 4, 2, 4)
    g = None if decay is None else -torch.full(decay, 0.25, dtype=tokens[5].dtype)
    state = _state(dtype, 2, [3, 16], window=4, layout=layout, HF=4, HS=4)
    return sample(*(x[:, 0] for x in tokens[:5]), tokens[5], g, state=state, window=4)


def _step_samples(dtype: torch.dtype) -> list[Sample]:
    tokens: list[Any] = _hybrid(dtype, 0, 1, 4, 2, 4)
    nobody = _state(dtype, 0, [], window=4, layout="sliding", HF=4, HS=4)
    return [
        sample(*(x[:, 0] for x in tokens[:5]), tokens[5], state=nobody, window=4),
        _step_sample(dtype, "sliding", None),
        _step_sample(dtype, "sliding", (4,)),
        _step_sample(dtype, "terraced", (2, 4)),
    ]


def _call(op: Any, call: Sample, **changes: Any) -> Any:
    return lambda: op(*call.args, **(call.kwargs | changes))


_f32 = torch.float32
_WINDOW = _window_samples(_f32)[0]
_HYBRID = _hybrid_samples(_f32)[0]
_PACKED = torch.tensor([0, 30, 20, 45])


def _dense_window(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )


def _adapt_dense(call: Sample) -> Sample:
    q, k, v = (x.transpose(1, 2).contiguous() for x in call.args[:3])
    i = torch.arange(q.shape[2])
    distance = i[:, None] - i
    return sample(q, k, v, (distance >= 0) & (distance < call.kwargs["window"]))


_SDPA = Peer("torch SDPA, dense mask", lambda: _dense_window, _adapt_dense, matmul=True)


def _bench(name: str, T: int, make: Any, F: int, window: int = 64, D: int = 64) -> BenchCase:
    per_query = 4 * window * D + (4 * F * D + 2 * F if F else 0)
    return BenchCase(
        name, make, flops=9 * T * per_query, bytes=4 * T * (9 * (2 * D + 2 * F) + 6 * D),
        rows=9 * T, reference=T <= 512,
    )  # fmt: skip


def _bench_hybrid(T: int) -> BenchCase:
    def make(dtype: torch.dtype) -> Sample:
        return sample(*_hybrid(dtype, 1, T, 9, 3, 9, K=64, V=64, F=128, decay=(9,)), window=64)

    return _bench(f"B1 HQ9 HKV3 T{T} D64 F128 w64", T, make, 128)


def _bench_window(T: int, window: int) -> BenchCase:
    def make(dtype: torch.dtype) -> Sample:
        return sample(*_qkv(dtype, 1, T, 9, 3, 64, 64), window=window)

    return _bench(f"B1 HQ9 HKV3 T{T} D64 w{window}", T, make, 0, window)


SPECS: list[OpSpec] = [
    OpSpec(
        name="window_attention",
        family="attention",
        function=functional.window_attention,
        reference=reference.window_attention,
        samples=_window_samples,
        tolerances=_TOLERANCES,
        differentiable=("q", "k", "v"),
        gradcheck=lambda: [
            sample(*_qkv(torch.float64, 1, 36, 2, 1, 3, 2), window=5, return_lse=True),
            sample(*_qkv(torch.float64, 1, 36, 1, 1, 3, 2), window=4, causal=False),
        ],
        bad_inputs=[
            BadInput(
                lambda: functional.window_attention(
                    _WINDOW.args[0], _WINDOW.args[1][:, :-1], _WINDOW.args[2], window=7
                ),
                RuntimeError,
                r"window_attention: expected k of shape \[B, T, HKV, K\]",
            ),
            BadInput(
                _call(functional.window_attention, _WINDOW, window=0),
                RuntimeError,
                "window_attention: expected window of at least 1, got 0",
            ),
            BadInput(
                lambda: functional.window_attention(
                    *(x[:1] for x in _WINDOW.args), window=7, cu_seqlens=_PACKED
                ),
                RuntimeError,
                "window_attention: expected cu_seqlens to ascend from 0",
            ),
        ],
        bench=[_bench_window(512, 64), _bench_window(2048, 64)],
        peers=[_SDPA],
    ),
    OpSpec(
        name="hybrid_attention",
        family="attention",
        function=functional.hybrid_attention,
        reference=reference.hybrid_attention,
        samples=_hybrid_samples,
        tolerances=_TOLERANCES,
        differentiable=("q", "k", "v", "qf", "kf", "mix", "g", "sink"),
        gradcheck=lambda: [
            sample(*_hybrid(torch.float64, 1, 36, 2, 1, 2, K=3, V=2, F=3, decay=(2,)), window=5),
            sample(
                *_hybrid(torch.float64, 1, 36, 4, 2, 2, K=3, V=2, F=3, decay=(2, 3)),
                window=5,
                sink=_sink(torch.float64, 1, 36),
            ),
            sample(
                *_hybrid(torch.float64, 1, 36, 2, 1, 1, K=3, V=2, F=3, decay=(1, 36, 2)),
                window=4,
                layout="terraced",
                output_final_state=True,
            ),
        ],
        bad_inputs=[
            BadInput(
                _call(functional.hybrid_attention, _HYBRID, layout="tiled"),
                ValueError,
                "hybrid_attention: expected layout 'sliding' or 'terraced', got 'tiled'",
            ),
            BadInput(
                _call(functional.hybrid_attention, _HYBRID, window=-1),
                RuntimeError,
                "hybrid_attention: expected window of at least 1, got -1",
            ),
            BadInput(
                lambda: functional.hybrid_attention(
                    *_HYBRID.args[:5], _HYBRID.args[5][:3], window=5
                ),
                RuntimeError,
                r"hybrid_attention: expected mix of shape \[HQ\] = \[4\]",
            ),
        ],
        time=("q", "k", "v", "qf", "kf", "g", "sink"),
        step=functional.hybrid_attention_step,
        bench=[_bench_hybrid(512), _bench_hybrid(2048)],
    ),
    OpSpec(
        name="hybrid_attention_step",
        family="attention",
        function=functional.hybrid_attention_step,
        reference=reference.hybrid_attention_step,
        samples=_step_samples,
        tolerances=_TOLERANCES,
        mutates=("state",),
        # torch.export's guards confuse the state's fields k and kf.
        exports=False,
        bad_inputs=[
            BadInput(
                _call(
                    functional.hybrid_attention_step, _step_sample(_f32, "sliding", None), window=3
                ),
                RuntimeError,
                "hybrid_attention_step: expected rings of window",
            ),
        ],
    ),
]
