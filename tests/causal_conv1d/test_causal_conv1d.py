"""The short convolution against torch's own, and what the specification of the op demands."""

import pytest
import torch
import torch.nn.functional as F

import fastweights as fw
from fastweights.testing import assert_close, available_cpu_levels, cpu_level


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def depthwise(x, weight, bias):
    """torch's convolution of [B, T, D]."""
    channels, width = weight.shape
    y = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=width - 1, groups=channels)
    return F.silu(y[..., : x.shape[1]]).mT


def signal(order, batch, length, channels, seed=0):
    if order == "channels":
        return draw(batch, length, channels, seed=seed)
    return draw(batch, channels, length, seed=seed).mT


@pytest.mark.parametrize("order", ["channels", "time"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 31])
def test_is_torchs_depthwise_convolution(order, width):
    # More tokens than two tiles have, more channels than one.
    shape = (2, 300, 515) if order == "channels" else (2, 2100, 9)
    x = signal(order, *shape).double().requires_grad_()
    weight = draw(shape[2], width, seed=1).double().requires_grad_()
    bias = draw(shape[2], seed=2).double().requires_grad_()
    expected = depthwise(x, weight, bias)
    cotangent = draw(*shape, seed=3).double()
    wanted = torch.autograd.grad(expected, (x, weight, bias), cotangent)
    for level in available_cpu_levels():
        with cpu_level(level):
            y, _ = fw.causal_conv1d(x, weight, bias, activation="silu")
            found = torch.autograd.grad(y, (x, weight, bias), cotangent)
        assert_close(y, expected, tolerance=1e-12, what=level)
        assert_close(found, wanted, tolerance=1e-11, what=level)


@pytest.mark.parametrize("order", ["channels", "time"])
def test_result_and_gradient_keep_the_memory_order(order):
    x = signal(order, 2, 20, 6).requires_grad_()
    y, _ = fw.causal_conv1d(x, draw(6, 4))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.stride() == x.stride()
    assert dx.stride() == x.stride()


@pytest.mark.parametrize("kept", [3, 4])
def test_single_updates_equal_one_call(kept):
    x, weight, bias = draw(2, 11, 33), draw(33, 4, seed=1), draw(33, seed=2)
    start = draw(2, 33, kept, seed=3)
    expected, final = fw.causal_conv1d(
        x, weight, bias, activation="silu", initial_state=start, output_final_state=True
    )
    state = start.clone()
    tokens = [
        fw.causal_conv1d_update(x[:, t], weight, bias, state=state, activation="silu")
        for t in range(11)
    ]
    assert_close(torch.stack(tokens, 1), expected, tolerance=1e-6)
    assert torch.equal(state, final)
    assert torch.equal(final, x[:, 11 - kept :].mT)


def test_the_length_of_the_state_does_not_matter():
    x, weight, start = draw(1, 5, 8), draw(8, 4, seed=1), draw(1, 8, 7, seed=2)
    results = [
        fw.causal_conv1d(x, weight, initial_state=start[..., 7 - kept :])[0] for kept in (3, 4, 7)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("seen", [0, 2, 9])
@pytest.mark.parametrize("kept", [3, 4, 7])
def test_a_ring_keeps_token_t_in_slot_t(kept, seen):
    x, weight, bias = draw(2, seen + 11, 33), draw(33, 4, seed=1), draw(33, seed=2)
    expected, _ = fw.causal_conv1d(x, weight, bias, activation="silu")
    ring, count = torch.zeros(2, 33, kept), torch.zeros(2, dtype=torch.int32)
    for t in range(seen):
        ring[..., t % kept] = x[:, t]
    found = []
    for token in x[:, seen:].unbind(1):
        y = fw.causal_conv1d_update(
            token, weight, bias, state=ring, activation="silu", cache_seqlens=count + seen
        )
        found.append(y)
        count += 1
    assert_close(torch.stack(found, 1), expected[:, seen:], tolerance=1e-6)
    for t in range(seen + 11 - kept, seen + 11):
        assert torch.equal(ring[..., t % kept], x[:, t])


def test_sequences_of_a_server_keep_to_their_rows():
    """Three sequences in a pool of six states; every step goes on with two of them."""
    x, weight = draw(3, 12, 18), draw(18, 4, seed=1)
    pool, row, seen = draw(6, 18, 5, seed=2), torch.tensor([4, 0, 3]), torch.zeros(3, dtype=int)
    before = pool.clone()
    pool[row] = 0
    expected, _ = fw.causal_conv1d(x, weight)
    for active in [(0, 1), (2, 0), (0, 2), (1, 0), (2, 1), (0, 2), (1, 2), (0, 1), (0, 2)]:
        now = torch.tensor(active)
        y = fw.causal_conv1d_update(
            x[now, seen[now]],
            weight,
            state=pool,
            cache_seqlens=seen[now],
            conv_state_indices=row[now],
        )
        assert_close(y, expected[now, seen[now]], tolerance=1e-6)
        seen[now] += 1
    assert torch.equal(pool[[1, 2, 5]], before[[1, 2, 5]])


def test_refused_rows_leave_the_state():
    state = draw(3, 4, 2)
    before = state.clone()
    with pytest.raises(RuntimeError, match="got 3"):
        fw.causal_conv1d_update(
            draw(2, 4), draw(4, 3), state=state, conv_state_indices=torch.tensor([0, 3])
        )
    assert torch.equal(state, before)


@pytest.mark.parametrize("order", ["channels", "time"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_one_graph_serves_lengths_that_only_the_data_tells(order):
    weight = draw(6, 4)

    def real_tokens(x, mask):
        places = mask.nonzero().squeeze(1)
        kept = x.index_select(1, places).mT if order == "time" else x.mT.index_select(0, places)
        return fw.causal_conv1d(kept.unsqueeze(0), weight, output_final_state=True)

    torch.compiler.reset()
    compiled = torch.compile(real_tokens, fullgraph=True, backend="aot_eager")
    stance = "default"
    for length in (9, 12, 1, 0):
        x, mask = draw(6, 12).requires_grad_(), torch.arange(12) < length
        expected = real_tokens(x, mask)
        with torch.compiler.set_stance(stance):
            y = compiled(x, mask)
        stance = "fail_on_recompile"
        assert_close(y, expected, tolerance=0, what=f"{length} tokens")
        found, wanted = (torch.autograd.grad(r[0].square().sum(), x) for r in (y, expected))
        assert_close(found, wanted, tolerance=0, what=f"gradient of {length} tokens")


@pytest.mark.parametrize("order", ["channels", "time"])
def test_packed_sequences_do_not_see_each_other(order):
    lengths = [1, 200, 2, 30, 3]
    x, weight, bias = signal(order, 1, sum(lengths), 21), draw(21, 4, seed=1), draw(21, seed=2)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    alone = [
        fw.causal_conv1d(part, weight, bias, activation="silu")[0] for part in x.split(lengths, 1)
    ]
    by_ends, states = fw.causal_conv1d(
        x, weight, bias, activation="silu", cu_seqlens=ends, output_final_state=True
    )
    by_index, last = fw.causal_conv1d(
        x, weight, bias, activation="silu", seq_idx=index.int(), output_final_state=True
    )
    assert_close(by_ends, torch.cat(alone, 1), tolerance=1e-6)
    assert torch.equal(by_index, by_ends)
    assert torch.equal(last, states[-1:])
    assert states[0, :, :2].count_nonzero() == 0


def test_activation_of_extreme_sums():
    x = torch.tensor([-1e30, -200.0, -89.0, -1e-30, 0.0, 1e-30, 89.0, 200.0, 1e30, torch.nan])
    x = x.repeat(2)[None, None]
    for level in available_cpu_levels():
        with cpu_level(level):
            y, _ = fw.causal_conv1d(x, torch.ones(20, 1), activation="silu")
        assert_close(y, F.silu(x), tolerance=1e-6, what=level)


def test_parameters_may_be_wider_than_the_signal():
    x, weight, bias = draw(1, 9, 16).bfloat16(), draw(16, 4, seed=1), draw(16, seed=2)
    weight.requires_grad_()
    y, _ = fw.causal_conv1d(x, weight, bias, activation="silu")
    expected = depthwise(x.float(), weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())
    (gradient,) = torch.autograd.grad(y.float().sum(), weight)
    assert gradient.dtype == torch.float32


def test_autocast_casts_signals_and_keeps_the_state():
    x, weight = draw(1, 9, 16), draw(16, 4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = fw.causal_conv1d(x, weight, activation="silu", output_final_state=True)
        wide = torch.zeros(1, 16, 3)
        token = fw.causal_conv1d_update(x[:, 0].bfloat16(), weight, state=wide)
    assert y.dtype == state.dtype == torch.bfloat16
    assert token.dtype == torch.float32
    assert torch.equal(wide[..., -1], x[:, 0].bfloat16().float())


def test_agrees_with_the_fallback_of_transformers():
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    x, weight, state = draw(2, 12, 10), draw(10, 4, seed=1), draw(2, 10, 4, seed=2)
    theirs = qwen.causal_conv1d_fn(x.mT, weight, None, activation="silu")
    ours, _ = fw.causal_conv1d(x, weight, activation="silu")
    assert_close(ours.mT, theirs, tolerance=1e-6)
    moved = state.clone()
    theirs = qwen.causal_conv1d_update(x[:, :1].mT, state, weight, None, "silu")
    ours = fw.causal_conv1d_update(x[:, :1], weight, state=moved, activation="silu")
    assert_close(ours.mT, theirs, tolerance=1e-6)
    assert torch.equal(moved, state)
