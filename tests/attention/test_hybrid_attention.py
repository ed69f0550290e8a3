"""What is particular to LoLCATs: its limits, its published form, its streaming form."""

import pytest
import torch

import fastweights as fw
from fastweights import reference
from fastweights.ops.attention.state import HybridState


def tokens(B=1, T=45, HQ=4, HKV=2, HF=4, K=8, V=6, F=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    features = normal(B, T, HQ, F).abs(), normal(B, T, HF, F).abs()
    return [normal(B, T, HQ, K), normal(B, T, HKV, K), normal(B, T, HKV, V), *features]


def softmax_attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o.transpose(1, 2)


@pytest.mark.parametrize("layout", ["sliding", "terraced"])
@pytest.mark.parametrize("window", [45, 64])
def test_window_of_the_whole_sequence_is_softmax(layout, window):
    x = tokens()
    expected = softmax_attention(*x[:3])
    for mix in (0.1, 1.0):
        gate = torch.full((4,), mix).double()
        o, _ = fw.hybrid_attention(*x, gate, window=window, layout=layout)
        torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    o = fw.window_attention(*x[:3], window=window)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)


def test_mix_of_zero_leaves_linear_attention_over_what_left_the_window():
    window = 7
    q, k, v, qf, kf = tokens(HKV=4)
    o, _ = fw.hybrid_attention(q, k, v, qf, kf, torch.full((4,), 1e-30).double(), window=window)
    i = torch.arange(45)
    weights = torch.einsum("bihf,bjhf->bhij", qf, kf) * (i[:, None] - i >= window)
    linear = (
        torch.einsum("bhij,bjhv->bihv", weights, v) / weights.sum(-1).transpose(1, 2)[..., None]
    )
    torch.testing.assert_close(o[:, window:], linear[:, window:], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        o[:, :window], softmax_attention(q, k, v)[:, :window], rtol=0, atol=1e-12
    )


def test_window_of_one_keeps_only_the_token_itself():
    x = tokens()
    torch.testing.assert_close(
        fw.window_attention(*x[:3], window=1), x[2].repeat_interleave(2, 2), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("window", [4, 9])
def test_is_the_published_form_on_rotated_features(window):
    """HazyResearch/lolcats' quadratic form: Hedgehog features of q, k after the rotation."""
    q, k, v, _, _ = tokens(HKV=4)
    generator = torch.Generator().manual_seed(3)
    w_q, w_k = (torch.randn(4, 8, 5, generator=generator, dtype=q.dtype) for _ in range(2))
    angle = torch.arange(45).double()[:, None] * 10000 ** -(torch.arange(4).double() / 4)
    cos, sin = (f(angle).repeat(1, 2)[None, :, None] for f in (torch.cos, torch.sin))

    def rotate(x):
        return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

    def hedgehog(x, w):
        y = torch.einsum("bthk,hkf->bthf", x, w)
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)

    q, k = rotate(q), rotate(k)
    qf, kf, gamma = hedgehog(q, w_q), hedgehog(k, w_k), torch.full((4,), -2.1972).double().sigmoid()
    i = torch.arange(45)
    distance = i[:, None] - i
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * 8**-0.5
    scores = scores.masked_fill(~((distance >= 0) & (distance < window)), -1e8)
    softmax = gamma[:, None, None] * torch.exp(scores - scores.amax(-1, keepdim=True))
    linear = torch.einsum("bihf,bjhf->bhij", qf, kf) * (distance >= window)
    total = (softmax + linear).sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bjhv->bihv", (softmax + linear) / total, v)
    o, _ = fw.hybrid_attention(q, k, v, qf, kf, gamma, torch.zeros(4).double(), window=window)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("layout", ["sliding", "terraced"])
@pytest.mark.parametrize("window", [1, 6, 20])
def test_streaming_is_the_parallel_form(dtype, tolerance, layout, window):
    x, mix = tokens(B=2, dtype=dtype), torch.linspace(0.1, 1, 4, dtype=dtype)
    g = -torch.linspace(0.01, 1, 4, dtype=dtype)
    kwargs = {"window": window, "layout": layout}
    expected, end = fw.hybrid_attention(*x, mix, g, **kwargs, output_final_state=True)
    state = HybridState.zeros(
        2, window=window, layout=layout, kv_heads=2, feature_heads=4, state_heads=4,
        key_dim=8, value_dim=6, feature_dim=5, dtype=dtype,
    )  # fmt: skip
    storage = [t.data_ptr() for t in state.tensors()]
    o = [
        fw.hybrid_attention_step(*(t[:, i] for t in x), mix, g, state=state, window=window)
        for i in range(45)
    ]
    torch.testing.assert_close(torch.stack(o, 1), expected, rtol=0, atol=tolerance)
    for got, want in zip(state.tensors(), end.tensors(), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert storage == [t.data_ptr() for t in state.tensors()]


@pytest.mark.parametrize("value", [-30.0, -200.0, -torch.inf])
def test_any_decay_gives_finite_values_and_gradients(value):
    x = [t.requires_grad_() for t in tokens(dtype=torch.float32)]
    mix = torch.full((4,), 0.5)
    g = torch.full((1, 45, 4), -0.01)
    g[:, 20] = value
    g.requires_grad_()
    o, _ = fw.hybrid_attention(*x, mix, g, window=5)
    expected, _ = reference.hybrid_attention(*(t.double() for t in x), mix, g.double(), window=5)
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(o.square().sum(), [*x, g])
    assert all(t.isfinite().all() for t in grads)


def test_gradients_reach_the_initial_state_as_in_the_reference():
    x, mix = tokens(B=2), torch.linspace(0.1, 1, 4).double()
    _, state = fw.hybrid_attention(*x, mix, window=6, output_final_state=True)
    grads = []
    for op in (fw.hybrid_attention, reference.hybrid_attention):
        leaves = [t.clone().requires_grad_() for t in state.tensors()[:5]]
        past = HybridState(*leaves, state.position)
        o, end = op(*x, mix, window=6, initial_state=past, output_final_state=True)
        loss = o.square().sum() + sum(t.square().sum() for t in end.tensors()[:5])
        grads.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_equal_scores_share_the_gradient_of_the_maximum():
    grads = []
    for op in (fw.hybrid_attention, reference.hybrid_attention):
        x = tokens()
        x[0].zero_()  # every score is 0: all keys of a window are its maximum
        x = [t.requires_grad_() for t in x]
        o, _ = op(*x, torch.full((4,), 0.5).double(), window=5)
        grads.append(torch.autograd.grad(o.square().sum(), x))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
