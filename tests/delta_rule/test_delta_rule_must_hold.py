"""What the papers' sheets say must hold, with their numbers."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import fastweights as fw
from fastweights import reference
from fastweights.testing import available_cpu_levels, cpu_level

FORMS = ("recurrent", "chunked")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def inputs(B=1, T=100, H=2, HV=2, K=8, V=16, dtype=torch.float32):
    """q, k, v and beta; keys of length one."""
    return (
        draw(B, T, H, K, seed=1, dtype=dtype),
        unit(draw(B, T, H, K, seed=2, dtype=dtype)),
        draw(B, T, HV, V, seed=3, dtype=dtype),
        draw(B, T, HV, seed=4, dtype=dtype).sigmoid(),
    )


def decay(*shape, dtype=torch.float32):
    return -draw(*shape, seed=5, dtype=dtype).abs()


@pytest.fixture(params=FORMS)
def rule(request):
    def call(q, k, v, beta=None, **kwargs):
        return fw.delta_rule(q, k, v, beta=beta, **kwargs, _form=request.param)

    return call


def wy_form(q, k, v, beta, chunk):
    """The paper's chunked form: T = (I + strict tril(beta k k^T))^-1."""
    length, K = q.shape
    S, outputs = q.new_zeros(K, v.shape[1]), []
    for start in range(0, length, chunk):
        Q, Kc, Vc, b = (x[start : start + chunk] for x in (q, k, v, beta[:, None]))
        T = torch.linalg.inv(torch.eye(len(Q), dtype=q.dtype) + (b * Kc @ Kc.T).tril(-1))
        N = T @ (b * Vc) - T @ (b * Kc) @ S
        outputs.append(Q @ S + (Q @ Kc.T).tril() @ N)
        S = S + Kc.T @ N
    return torch.cat(outputs), S


@pytest.mark.parametrize("chunk", [1, 16, 64, 150])
def test_equals_the_wy_form_for_any_chunk(rule, chunk):
    q, k, v, beta = inputs(T=150, H=1, HV=1, dtype=torch.float64)
    o, S = rule(q, k, v, 2 * beta, scale=1.0, output_final_state=True)
    expected, final = wy_form(*(x[0, :, 0] for x in (q, k, v, 2 * beta)), chunk)
    assert_close(o[0, :, 0], expected)
    assert_close(S[0, 0], final)


def test_beta_of_zero_leaves_the_state(rule):
    q, k, v, beta = inputs()
    S0 = draw(1, 2, 8, 16, seed=6)
    o, S = rule(q, k, v, 0 * beta, scale=1.0, initial_state=S0, output_final_state=True)
    assert torch.equal(S, S0)
    assert_close(o, torch.einsum("bthk,bhkv->bthv", q, S0))
    g = decay(1, 100, 2) / 20
    o, S = rule(q, k, v, 0 * beta, g=g, scale=1.0, initial_state=S0, output_final_state=True)
    faded = g.cumsum(1).exp()[..., None, None] * S0[:, None]
    assert_close(S, faded[:, -1])
    assert_close(o, torch.einsum("bthk,bthkv->bthv", q, faded))


def test_orthonormal_keys_look_up_exactly(rule):
    keys = torch.eye(16).view(1, 16, 1, 16)
    values = draw(1, 16, 1, 5)
    _, S = rule(keys, keys, values, torch.ones(1, 16, 1), output_final_state=True)
    for i in torch.randperm(16):
        query = keys[:, i]
        state = S.clone()
        o = fw.delta_rule_step(query, query, values[:, 0], beta=torch.zeros(1, 1), state=state)
        assert torch.equal(o, values[:, i] * 16**-0.5)


def test_writing_a_key_again_replaces_its_value(rule):
    key = unit(draw(1, 1, 1, 8)).expand(1, 2, 1, 8)
    v = draw(1, 2, 1, 4, seed=1)
    o, _ = rule(key, key, v, torch.ones(1, 2, 1), scale=1.0)
    assert_close(o[0, 1], v[0, 1])
    added, _ = fw.linear_attention(key, key, v, scale=1.0)
    assert_close(added[0, 1], v[0].sum(0))


def test_gate_of_zero_is_no_gate(rule):
    q, k, v, beta = inputs()
    expected, _ = rule(q, k, v, beta)
    for shape in ((2,), (1, 100, 2), (1, 100, 2, 8)):
        assert_close(rule(q, k, v, beta, g=torch.zeros(shape))[0], expected, rtol=1e-5, atol=1e-5)


def gradients(o, *leaves):
    return torch.autograd.grad(o.square().sum(), leaves)


def test_gate_constant_over_channels_is_the_scalar_gate(rule):
    q, k, v, beta = (x.requires_grad_() for x in inputs(dtype=torch.float64))
    g = decay(1, 100, 2, dtype=torch.float64).requires_grad_()
    scalar, _ = rule(q, k, v, beta, g=g)
    channel, _ = rule(q, k, v, beta, g=g[..., None].expand(1, 100, 2, 8))
    assert_close(channel, scalar)
    for a, b in zip(
        gradients(channel, q, k, v, beta, g), gradients(scalar, q, k, v, beta, g), strict=True
    ):
        assert_close(a, b)


def test_erase_and_write_of_beta_are_beta(rule):
    q, k, v, beta = inputs()
    g = decay(1, 100, 2, 8)
    expected, _ = rule(q, k, v, beta, g=g)
    erase, write = beta[..., None].expand(1, 100, 2, 8), beta[..., None].expand(1, 100, 2, 16)
    assert_close(rule(q, k, v, g=g, erase=erase, write=write)[0], expected)


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_without_an_erase_key_it_is_linear_attention(rule, rank):
    q, k, v, _ = (x.requires_grad_() for x in inputs(dtype=torch.float64))
    shape = {1: (2,), 3: (1, 100, 2), 4: (1, 100, 2, 8)}.get(rank)
    g = None if shape is None else decay(*shape, dtype=torch.float64).requires_grad_()
    leaves = [x for x in (q, k, v, g) if x is not None]
    o, S = rule(q, k, v, g=g, erase=torch.zeros(1, 100, 2, 8), output_final_state=True)
    expected, final = fw.linear_attention(q, k, v, g, output_final_state=True)
    assert_close(o, expected)
    assert_close(S, final)
    for a, b in zip(
        torch.autograd.grad(o.square().sum() + S.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum() + final.square().sum(), leaves),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize("channels", [False, True])
def test_gate_of_minus_infinity_forgets_exactly(rule, channels):
    q, k, v, beta = inputs()
    g = decay(1, 100, 2, 8) if channels else decay(1, 100, 2)
    g[:, 57] = -math.inf
    S0 = draw(1, 2, 8, 16, seed=6)
    o, S = rule(q, k, v, beta, g=g, initial_state=S0, output_final_state=True)
    rest = (x[:, 57:] for x in (q, k, v, beta))
    tail, same = rule(*rest, g=g[:, 57:], output_final_state=True)
    assert_close(o[:, 57:], tail)
    assert_close(S, same)


@pytest.mark.parametrize("level", available_cpu_levels())
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_any_gate_gives_finite_values_and_gradients(rule, rank, level):
    shape = {1: (2,), 3: (1, 100, 2), 4: (1, 100, 2, 8)}[rank]
    q, k, v, beta = (x.requires_grad_() for x in inputs())
    for strength in (-20.0, -30.0, -math.inf):
        g = torch.full(shape, strength)
        if rank > 1:
            g[:, ::3] = -0.01
        g.requires_grad_()
        leaves = (q, k, v, beta, g)
        oracle = [x.detach().double().requires_grad_() for x in leaves]
        with cpu_level(level):
            o, _ = rule(q, k, v, beta, g=g)
            got = gradients(o, *leaves)
        expected, _ = reference.delta_rule(*oracle[:3], beta=oracle[3], g=oracle[4])
        assert_close(o.double(), expected, rtol=1e-4, atol=1e-5)
        assert all(x.isfinite().all() for x in got)
        if strength == -math.inf:
            assert not got[4][g == -math.inf].any()
            continue
        for a, b in zip(got, gradients(expected, *oracle), strict=True):
            assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def test_grouped_value_heads_are_repeated_queries_and_keys(rule):
    q, k, v, beta = inputs(H=2, HV=6)
    g = decay(1, 100, 6)
    grouped, _ = rule(q, k, v, beta, g=g)
    repeated, _ = rule(q.repeat_interleave(3, 2), k.repeat_interleave(3, 2), v, beta, g=g)
    assert torch.equal(grouped, repeated)


def test_packed_sequences_equal_a_loop_over_them(rule):
    q, k, v, beta = inputs(T=140)
    g = decay(1, 140, 2)
    ends = [0, 0, 70, 73, 73, 140, 140]
    S0 = draw(6, 2, 8, 16, seed=6)
    o, S = rule(
        q,
        k,
        v,
        beta,
        g=g,
        initial_state=S0,
        output_final_state=True,
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
    )
    for n, (start, end) in enumerate(pairwise(ends)):
        part, state = rule(
            *(x[:, start:end] for x in (q, k, v, beta)),
            g=g[:, start:end],
            initial_state=S0[n : n + 1],
            output_final_state=True,
        )
        assert torch.equal(o[:, start:end], part)
        assert torch.equal(S[n : n + 1], state)
    assert torch.equal(S[0], S0[0])


def test_padding_on_the_left_with_zeros_changes_nothing(rule):
    q, k, v, beta = inputs()
    g = decay(1, 100, 2)
    o, S = rule(q, k, v, beta, g=g, qk_l2norm=True, output_final_state=True)
    padded = [torch.cat([torch.zeros_like(x[:, :37]), x], 1) for x in (q, k, v, beta, g)]
    same, final = rule(*padded[:4], g=padded[4], qk_l2norm=True, output_final_state=True)
    assert_close(same[:, 37:], o, rtol=1e-5, atol=1e-6)
    assert_close(final, S, rtol=1e-5, atol=1e-6)


def test_later_tokens_leave_earlier_outputs_bit_identical(rule):
    q, k, v, beta = inputs(T=90)
    g = decay(1, 90, 2, 8)
    for gate in (None, g[..., 0], g):
        o, _ = rule(q, k, v, beta, g=gate)
        for j in (0, 31, 45, 89):
            for value in (1e3, math.nan):
                changed = [x.clone() for x in (q, k, v, beta)]
                for x in changed:
                    x[:, j] = value
                got, _ = rule(*changed, g=gate)
                assert torch.equal(got[:, :j], o[:, :j])
                assert not torch.equal(got[:, j:], o[:, j:])


def delta_product(q, k, v, beta, g, n):
    """Gated DeltaProduct as the delta rule on n tokens for every one: k, v, beta have T n rows."""
    query = torch.zeros_like(k)
    query[:, n - 1 :: n] = q
    gate = torch.zeros_like(beta)
    gate[:, ::n] = g
    return fw.delta_rule(query, k, v, beta=beta, g=gate, scale=1.0)[0][:, n - 1 :: n]


def test_one_householder_is_the_gated_delta_rule():
    q, k, v, beta = inputs()
    g = decay(1, 100, 2)
    expected, _ = fw.delta_rule(q, k, v, beta=beta, g=g, scale=1.0)
    assert torch.equal(delta_product(q, k, v, beta, g, 1), expected)


def test_two_householders_with_beta_two_rotate_in_their_plane():
    # Reflections at angles a and b compose to a rotation by 2 (b - a); v = 0 only transforms S0.
    angle, T = 0.3, 25
    directions = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    k = directions.repeat(T, 1).view(1, 2 * T, 1, 2)
    _, S = fw.delta_rule(
        k,
        k,
        torch.zeros(1, 2 * T, 1, 2),
        beta=torch.full((1, 2 * T, 1), 2.0),
        initial_state=torch.eye(2).view(1, 1, 2, 2),
        output_final_state=True,
    )
    turn = 2 * angle * T
    rotation = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    assert_close(S[0, 0], torch.tensor(rotation), rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", available_cpu_levels())
@pytest.mark.parametrize("channels", [False, True])
def test_error_at_the_size_of_real_models(level, channels):
    T, K = 1000, 128
    q, k, v, beta = inputs(T=T, H=1, HV=1, K=K, V=K)
    # As Gated DeltaNet is initialised: A in (0, 16), dt in (1e-3, 1e-1).
    generator = torch.Generator().manual_seed(7)
    A_log = (16 * torch.rand(1, generator=generator)).log()
    shape = (1, T, 1, K) if channels else (1, T, 1)
    g = -A_log.exp() * torch.nn.functional.softplus(draw(*shape, seed=8) - 4.0)
    for form in FORMS:
        with cpu_level(level):
            o, _ = fw.delta_rule(q, k, v, beta=2 * beta, g=g, qk_l2norm=True, _form=form)
        expected, _ = fw.delta_rule(
            *(x.double() for x in (q, k, v)),
            beta=2 * beta.double(),
            g=g.double(),
            qk_l2norm=True,
            _form="recurrent",
        )
        assert (o - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_training_keeps_one_state_per_64_tokens_and_the_corrections():
    q, k, v, beta = inputs(T=200, K=32, V=32)
    _, _, states, corrections = torch.ops.fastweights.delta_rule(
        *(q, k, v, beta, *[None] * 7),
        scale=1.0,
        qk_l2norm=False,
        lower_bound=None,
        beta_range=0.0,
        output_final_state=False,
        state_v_first=False,
        keep_states=True,
        form="auto",
    )
    assert states.numel() <= (200 // 64 + 1) * 2 * 32 * 32
    assert corrections.shape == v.shape


def test_backward_without_what_is_kept_is_the_same():
    q, k, v, beta = inputs(T=150)
    g = decay(1, 150, 2, 8)
    arguments = (q, k, v, beta, g, *[None] * 6)
    options = {"scale": 0.5, "qk_l2norm": True, "lower_bound": None, "beta_range": 0.0}
    o, _, *kept = torch.ops.fastweights.delta_rule(
        *arguments,
        **options,
        output_final_state=False,
        state_v_first=False,
        keep_states=True,
        form="auto",
    )
    backward = torch.ops.fastweights.delta_rule_backward
    given = backward(o, None, *arguments, *kept, **options, state_v_first=False)
    empty = [x[:0] for x in kept]
    without = backward(o, None, *arguments, *empty, **options, state_v_first=False)
    for a, b in zip(given, without, strict=True):
        assert torch.equal(a, b)


def test_reads_views_of_one_projection():
    mixed = draw(2, 70, 3 * 2 * 8)
    q, k, v = (x.unflatten(-1, (2, 8)) for x in mixed.split(16, dim=-1))
    o, _ = fw.delta_rule(q, k, v, qk_l2norm=True)
    expected, _ = fw.delta_rule(*(x.contiguous() for x in (q, k, v)), qk_l2norm=True)
    assert torch.equal(o, expected)


def test_autocast_computes_in_bfloat16_and_keeps_the_state():
    q, k, v, beta = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, S = fw.delta_rule(q, k, v, beta=beta, output_final_state=True)
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
