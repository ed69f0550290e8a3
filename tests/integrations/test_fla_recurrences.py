"""fla's functions that are more than one call of an op: gates per value channel, and HGRN."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from fastweights.integrations.fla import ops

B, T, H, K, V = 2, 9, 2, 4, 6


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(rows=B, value_heads=H, dtype=torch.float32):
    return (
        draw(rows, T, H, K, seed=1, dtype=dtype),
        draw(rows, T, H, K, seed=2, dtype=dtype),
        draw(rows, T, value_heads, V, seed=3, dtype=dtype),
    )


def gate(*shape, dtype=torch.float32):
    return -draw(*shape, seed=4, dtype=dtype).abs()


def beta(*shape, dtype=torch.float32):
    return draw(*shape, seed=5, dtype=dtype).sigmoid()


# ---- a gate or a step size for every value channel ---------------------------------------------


def test_per_value_channel_is_the_recurrence_written_out():
    q, k, v = qkv()
    gk, gv, b = gate(B, T, H, K), 2 * gate(B, T, H, V), beta(B, T, H, V)
    S = draw(B, H, K, V)
    outputs = []
    for t in range(T):
        S = (gk[:, t, :, :, None] + gv[:, t, :, None, :]).exp() * S
        d = b[:, t] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + k[:, t, :, :, None] * d[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) * K**-0.5)
    got = ops.fused_recurrent_gated_delta_rule(
        q, k, v, gk=gk, gv=gv, beta=b, initial_state=draw(B, H, K, V), output_final_state=True
    )
    assert_close(got, (torch.stack(outputs, 1), S), rtol=1e-4, atol=1e-5)


def test_gla_with_both_gates():
    q, k, v = qkv()
    gk, gv = gate(B, T, H, K), 2 * gate(B, T, H, V)
    S = draw(B, H, K, V)
    outputs = []
    for t in range(T):
        S = (gk[:, t, :, :, None] + gv[:, t, :, None, :]).exp() * S
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) * K**-0.5)
    expected = torch.stack(outputs, 1), S
    start = draw(B, H, K, V)
    got = ops.fused_recurrent_gla(q, k, v, gk, gv, initial_state=start, output_final_state=True)
    assert_close(got, expected)
    o, state = ops.fused_recurrent_gla(
        q, k, v, gk, gv, initial_state=start.mT, output_final_state=True, state_v_first=True
    )
    assert_close((o, state.mT), expected)
    without = ops.fused_recurrent_gla(q, k, v, None, gv)
    assert_close(without, ops.fused_recurrent_gla(q, k, v, torch.zeros_like(gk), gv))


def test_gradients_per_value_channel():
    d = torch.float64
    q, k, v = (x[:, :3].clone().requires_grad_() for x in qkv(dtype=d))
    gv = gate(B, 3, H, V, dtype=d).requires_grad_()
    b = beta(B, 3, H, V, dtype=d).requires_grad_()
    g = draw(B, 3, H, dtype=d).requires_grad_()
    A_log, dt_bias = (draw(H, seed=s, dtype=d).requires_grad_() for s in (6, 7))

    def function(q, k, v, g, gv, b, A_log, dt_bias):
        return ops.fused_recurrent_gated_delta_rule(
            q, k, v, g, None, gv, b, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
            output_final_state=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, k, v, g, gv, b, A_log, dt_bias))


# ---- the elementwise recurrence ----------------------------------------------------------------


@pytest.mark.parametrize("offsets", [None, [0, 0, 3, 4, 9, 9]])
def test_hgrn_is_its_recurrence(offsets):
    x, g = draw(1, T, 5, seed=1), gate(1, T, 5)
    g[0, 6, 2] = -torch.inf
    bounds = [0, T] if offsets is None else offsets
    states = draw(len(bounds) - 1, 5, seed=3)
    h, finals = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        state = states[n]
        for t in range(start, end):
            state = g[0, t].exp() * state + x[0, t]
            h.append(state)
        finals.append(state)
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    got = ops.fused_recurrent_hgrn(x, g, states, True, cu_seqlens)
    assert_close(got, (torch.stack(h).unsqueeze(0), torch.stack(finals)))


@pytest.mark.parametrize("offsets", [None, [0, 0, 1, 5]])
def test_hgrn_gradients(offsets):
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    rows = 2 if offsets is None else 1
    x = draw(rows, 5, 3, dtype=torch.float64).requires_grad_()
    g = gate(rows, 5, 3, dtype=torch.float64).requires_grad_()
    state = draw(rows if offsets is None else 3, 3, dtype=torch.float64).requires_grad_()

    def function(x, g, state):
        return ops.fused_recurrent_hgrn(x, g, state, True, cu_seqlens)

    assert torch.autograd.gradcheck(function, (x, g, state))


@pytest.mark.parametrize("name", ["chunk_hgrn", "fused_recurrent_hgrn"])
def test_hgrn_without_tokens_and_without_states(name):
    function = getattr(ops, name)
    empty, state = draw(2, 0, 5), draw(2, 5)
    h, final = function(empty, empty, state, True)
    assert h.shape == (2, 0, 5)
    assert_close(final, state)
    assert function(empty, empty)[1] is None
    assert_close(function(empty, empty, None, True)[1], torch.zeros(2, 5))
    assert function(draw(2, 1, 5).bfloat16(), gate(2, 1, 5), None, True)[1].dtype == torch.bfloat16
