"""What the papers' sheets say must hold, with their numbers."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import fastweights as fw
from fastweights import reference
from fastweights.testing import cpu_level

FORMS = ("recurrent", "chunked")
Q = torch.tensor([[1.0, 0], [0, 1], [1, 1]]).view(1, 3, 1, 2)
V = torch.tensor([[1.0, 2], [3, 4], [5, 6]]).view(1, 3, 1, 2)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(B=1, T=100, H=2, K=8, V=16, dtype=torch.float32):
    return (
        draw(B, T, H, K, seed=1, dtype=dtype),
        draw(B, T, H, K, seed=2, dtype=dtype),
        draw(B, T, H, V, seed=3, dtype=dtype),
    )


@pytest.fixture(params=FORMS)
def attend(request):
    def call(*args, **kwargs):
        return fw.linear_attention(*args, **kwargs, _form=request.param)

    return call


def test_three_tokens(attend):
    o, _ = attend(Q, Q, V, scale=1.0)
    assert_close(o.squeeze(), torch.tensor([[1.0, 2], [3, 4], [14, 18]]))
    o, _ = attend(Q, Q, V, scale=1.0, normalize=True)
    assert_close(o[0, -1, 0], torch.tensor([3.5, 4.5]), rtol=1e-5, atol=1e-5)


def test_three_tokens_that_lose_half_at_each_step(attend):
    o, _ = attend(Q, Q, V, torch.tensor([math.log(0.5)]), scale=1.0)
    assert_close(o.squeeze(), torch.tensor([[1.0, 2], [3, 4], [11.75, 14.5]]))


def test_impulse_decays_by_gamma_of_its_head(attend):
    gamma = 1 - 2.0 ** (-5 - torch.arange(4))
    assert_close(gamma, torch.tensor([0.96875, 0.984375, 0.9921875, 0.99609375]), rtol=0, atol=0)
    T, impulse = 80, 7
    v = torch.zeros(1, T, 4, 3)
    v[:, impulse] = 1
    ones = torch.ones(1, T, 4, 1)
    o, _ = attend(ones, ones, v, gamma.log(), scale=1.0)
    steps = torch.arange(T - impulse)[:, None]
    assert_close(o[0, impulse:, :, 0], gamma**steps, rtol=2e-5, atol=0)
    assert not o[:, :impulse].any()


def test_equals_masked_quadratic_form_for_any_slopes(attend):
    q, k, v = qkv(T=150, H=4, dtype=torch.float64)
    slopes = torch.tensor([0.0, 0.3, 0.004, 2.0], dtype=torch.float64)
    distance = torch.arange(150)[:, None] - torch.arange(150)
    decay = torch.exp(-slopes[:, None, None] * distance).tril()
    expected = torch.einsum("bthk,bshk,hts,bshv->bthv", q, k, decay, v)
    assert_close(attend(q, k, v, -slopes, scale=1.0)[0], expected)


def test_later_tokens_leave_earlier_outputs_bit_identical(attend):
    q, k, v = qkv(T=90)
    g = -torch.rand(1, 90, 2, 8, generator=torch.Generator().manual_seed(4))
    for gate in (None, g[..., 0], g):
        o, _ = attend(q, k, v, gate)
        for j in (0, 31, 45, 89):
            for value in (1e3, math.nan):
                q2, k2, v2 = q.clone(), k.clone(), v.clone()
                q2[:, j], k2[:, j], v2[:, j] = value, value, value
                changed, _ = attend(q2, k2, v2, gate)
                assert torch.equal(changed[:, :j], o[:, :j])
                assert not torch.equal(changed[:, j:], o[:, j:])


def test_reverse_is_flipped_time(attend):
    q, k, v = qkv()
    g = -draw(1, 100, 2, 8, seed=4).abs()
    backward, state = attend(q, k, v, g, reverse=True, output_final_state=True)
    forward, same = attend(*(x.flip(1) for x in (q, k, v, g)), output_final_state=True)
    assert torch.equal(backward, forward.flip(1))
    assert torch.equal(state, same)


def test_v_permutation_is_equivariant(attend):
    q, k, v = qkv()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attend(q, k, v[..., order])[0], attend(q, k, v)[0][..., order])


def test_packed_sequences_equal_a_loop_over_them(attend):
    q, k, v = qkv(T=140)
    g = -draw(1, 140, 2, seed=4).abs()
    ends = [0, 0, 70, 73, 73, 140, 140]
    initial = draw(6, 2, 8, 16, seed=5)
    o, final = attend(
        q,
        k,
        v,
        g,
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
    )
    for n, (start, end) in enumerate(pairwise(ends)):
        part, state = attend(
            *(x[:, start:end] for x in (q, k, v, g)),
            initial_state=initial[n : n + 1],
            output_final_state=True,
        )
        assert torch.equal(o[:, start:end], part)
        assert torch.equal(final[n : n + 1], state)
    assert torch.equal(final[0], initial[0])


def test_gate_of_zero_is_no_gate(attend):
    q, k, v = qkv()
    expected, _ = attend(q, k, v)
    for shape in ((2,), (1, 100, 2), (1, 100, 2, 8)):
        assert_close(attend(q, k, v, torch.zeros(shape))[0], expected, rtol=1e-5, atol=1e-5)


def test_gate_constant_over_channels_is_the_scalar_gate(attend):
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float64))
    g = -draw(1, 100, 2, seed=4, dtype=torch.float64).abs()
    scalar, _ = attend(q, k, v, g)
    channel, _ = attend(q, k, v, g[..., None].expand(1, 100, 2, 8))
    assert_close(channel, scalar)
    for a, b in zip(
        torch.autograd.grad(channel.square().sum(), (q, k, v)),
        torch.autograd.grad(scalar.square().sum(), (q, k, v)),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize("channels", [False, True])
def test_gate_of_minus_infinity_resets_exactly(attend, channels):
    q, k, v = qkv(T=100)
    g = -draw(1, 100, 2, 8, seed=4).abs() if channels else -draw(1, 100, 2, seed=4).abs()
    g[:, 57] = -math.inf
    o, state = attend(q, k, v, g, initial_state=draw(1, 2, 8, 16), output_final_state=True)
    assert_close(o[0, 57], torch.einsum("hk,hk,hv->hv", q[0, 57], k[0, 57], v[0, 57]) * 8**-0.5)
    tail, same = attend(*(x[:, 57:] for x in (q, k, v, g)), output_final_state=True)
    assert_close(o[:, 57:], tail)
    assert_close(state, same)


@pytest.mark.parametrize("level", ["baseline", None])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_any_gate_gives_finite_values_and_gradients(attend, rank, level):
    shape = {1: (2,), 3: (1, 100, 2), 4: (1, 100, 2, 8)}[rank]
    q, k, v = (x.requires_grad_() for x in qkv())
    for strength in (-30.0, -math.inf):
        g = torch.full(shape, strength)
        if rank > 1:
            g[:, ::3] = -0.01
        g.requires_grad_()
        oracle = [x.detach().double().requires_grad_() for x in (q, k, v, g)]
        with cpu_level(level) if level else torch.enable_grad():
            o, _ = attend(q, k, v, g)
            grads = torch.autograd.grad(o.square().sum(), (q, k, v, g))
        expected, _ = reference.linear_attention(*oracle)
        assert_close(o.double(), expected, rtol=1e-4, atol=1e-4)
        assert all(x.isfinite().all() for x in grads)
        if strength == -math.inf:
            assert not grads[3][g == -math.inf].any()
            continue
        for got, want in zip(
            grads, torch.autograd.grad(expected.square().sum(), oracle), strict=True
        ):
            # The gate's gradient is a difference of sums of about 1e4: absolute errors only.
            assert_close(got.double(), want, rtol=1e-3, atol=1e-2)


def test_nan_propagates_from_where_it_is(attend):
    q, k, v = qkv()
    g = torch.full((1, 100, 2), -0.1)
    g[0, 40, 1] = math.nan
    o, _ = attend(q, k, v, g)
    assert o[0, 40:, 1].isnan().all()
    assert o[0, :, 0].isfinite().all() and o[0, :40, 1].isfinite().all()


def test_gradient_of_gate_is_the_reverse_cumulative_sum(attend):
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float64))
    g = (-draw(1, 100, 2, 8, seed=4, dtype=torch.float64).abs() / 8).requires_grad_()
    o, S = attend(q, k, v, g, output_final_state=True)
    dS = draw(*S.shape, seed=6, dtype=torch.float64)
    dq, dk, dg = torch.autograd.grad((o.square().sum() + (S * dS).sum()), (q, k, g))
    terms = (q * dq - k * dk).detach()
    suffix = terms.flip(1).cumsum(1).flip(1)
    assert_close(dg, suffix + (dS * S.detach()).sum(-1)[:, None])


def test_kept_states_are_speed_not_meaning():
    q, k, v = (x.requires_grad_() for x in qkv(T=150))
    g = (-draw(1, 150, 2, seed=4).abs()).requires_grad_()

    def checkpointed(*args):
        return fw.linear_attention(*args)[0]

    kept = torch.autograd.grad(checkpointed(q, k, v, g).square().sum(), (q, k, v, g))
    options = dict(
        scale=8**-0.5, normalize=False, eps=0.0, state_v_first=False, reverse=False, form="auto"
    )
    with torch.no_grad():
        o, _ = fw.linear_attention(q, k, v, g)
        none = (None,) * 3
        recomputed = torch.ops.fastweights.linear_attention_backward(
            2 * o, None, None, q, k, v, g, None, *none, torch.empty(0), **options
        )
    for a, b in zip(kept, recomputed, strict=False):
        assert torch.equal(a, b)


def test_autocast_casts_q_k_v_and_keeps_gates_and_states():
    q, k, v = qkv()
    g = -draw(1, 100, 2, seed=4).abs()
    state = draw(1, 2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        o, final = fw.linear_attention(q, k, v, g, initial_state=state, output_final_state=True)
        fw.linear_attention_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], state=state)
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    low = (x.bfloat16() for x in (q, k, v))
    expected, _ = fw.linear_attention(*low, g, initial_state=draw(1, 2, 8, 16))
    assert torch.equal(o, expected)


def test_ops_of_other_devices_run_the_reference(monkeypatch):
    from fastweights.ops import _common

    monkeypatch.setattr(_common, "_BACKEND", "reference")
    q, k, v = qkv(T=5)
    expected, _ = reference.linear_attention(q, k, v)
    assert torch.equal(fw.linear_attention(q, k, v)[0], expected)
