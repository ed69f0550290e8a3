"""GPTQ against the numbers of its sheet, and on a model."""

import copy

import pytest
import torch

from fastweights import perplexity, quantize, quantize_
from fastweights.functional import dequantize
from fastweights.quantization import gptq, gptq_
from fastweights.quantization.gptq import round_columns
from tiny_models import linear_model, softmax_model

X = torch.tensor(
    [[1, 0.5, 0, 0], [0, 1, 0.5, 0.25], [0.5, 0, 1, 0.5], [0, 0.25, 0.5, 2], [1, 1, 0, 0.5]]
)
W = torch.tensor([[0.9, -0.4, 0.3, 0.1], [-0.2, 0.7, -0.6, 0.5]])
H = 2 * X.T @ X / 5


def loss(w, q, hessian, damping=0.01):
    """½ tr((W − Q) H (W − Q)ᵀ) with the damped Hessian."""
    h = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    d = (w - q).double()
    return 0.5 * float((d @ h * d).sum())


def asymmetric_grid(w, bits):
    """Scale and minimum per row, by the rule of the official quantizer."""
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale.expand_as(w), (-scale * (-low / scale).round()).expand_as(w)


def nearest(w, scale, minimum, bits):
    return scale * ((w - minimum) / scale).round().clamp(0, 2**bits - 1) + minimum


def rounded(w, hessian, scale, minimum, bits, **options):
    codes = round_columns(w, hessian, scale, minimum, (0, 2**bits - 1), **options)
    return scale * codes + minimum


def correlated(rows, width, seed=0):
    """A weight and the Hessian of ill-conditioned inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    mixing = mixing * torch.logspace(0, -2, width)
    x = torch.randn(4 * width, width, generator=generator) @ mixing.T
    return torch.randn(rows, width, generator=generator), x.T @ x / len(x)


def test_the_worked_example():
    scale, minimum = asymmetric_grid(W, 2)
    assert scale.unique().tolist() == pytest.approx([0.433333], abs=1e-6)
    plain = nearest(W, scale, minimum, 2)
    assert loss(W, plain, H) == pytest.approx(0.06889896, rel=1e-5)

    q = rounded(W, H, scale, minimum, 2)
    assert q[0].tolist() == pytest.approx(plain[0].tolist())
    assert q[1].tolist() == pytest.approx([0, 0.433333, -0.433333, 0.433333], abs=1e-6)
    assert loss(W, q, H) == pytest.approx(0.03355972, rel=1e-5)

    q = rounded(W, H, scale, minimum, 2, act_order=True)
    assert q[1].tolist() == pytest.approx([-0.433333, 0.866667, -0.433333, 0.433333], abs=1e-6)
    assert loss(W, q, H) == pytest.approx(0.02636458, rel=1e-5)


def test_blocks_do_not_matter():
    w, h = correlated(8, 192)
    grid = asymmetric_grid(w, 4)
    one = rounded(w, h, *grid, 4, block=1)
    for block in (128, 192):
        torch.testing.assert_close(rounded(w, h, *grid, 4, block=block), one)


def test_uncorrelated_inputs_give_nearest_rounding():
    w, _ = correlated(8, 64)
    grid = asymmetric_grid(w, 3)
    torch.testing.assert_close(rounded(w, 3 * torch.eye(64), *grid, 3), nearest(w, *grid, 3))


@pytest.mark.parametrize(("bits", "plain_order", "act_order"), [(4, 0.60, 0.27), (3, 0.60, 0.28)])
def test_correlated_inputs_lose_less(bits, plain_order, act_order):
    """The sheet's shares of the error of nearest rounding, which depend on the problem."""
    w, h = correlated(128, 256)
    grid = asymmetric_grid(w, bits)
    reference = loss(w, nearest(w, *grid, bits), h)
    assert loss(w, rounded(w, h, *grid, bits), h) < (plain_order + 0.1) * reference
    assert loss(w, rounded(w, h, *grid, bits, act_order=True), h) < (act_order + 0.1) * reference


@pytest.mark.parametrize("group_size", [32, 64])
def test_packed_weight(group_size):
    w, h = correlated(48, 200)
    found = gptq(w, h, "int4", group_size=group_size)
    plain = quantize(w, "int4", group_size=group_size)
    assert found.packed.shape == plain.packed.shape
    assert loss(w, dequantize(found), h) < 0.5 * loss(w, dequantize(plain), h)


def test_a_weight_on_the_grid_stays():
    w, h = correlated(32, 96)
    w = dequantize(quantize(w, "int4", group_size=32))
    assert torch.equal(dequantize(gptq(w, h, group_size=32)), w)


def test_dead_and_dependent_inputs():
    w, _ = correlated(16, 64)
    x = torch.zeros(128, 64)
    x[:, 1] = torch.randn(128, generator=torch.Generator().manual_seed(0))
    x[:, 2] = x[:, 1]
    q = dequantize(gptq(w, x.T @ x))
    assert torch.isfinite(q).all()
    assert loss(w, q, x.T @ x) <= loss(w, dequantize(quantize(w, "int4")), x.T @ x)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(8), r"gptq: expected a finite hessian of shape \[64, 64\], got \[8, 8\]"),
        (torch.full((64, 64), torch.nan), "gptq: expected a finite hessian"),
        (-torch.eye(64), "gptq: expected a positive semidefinite hessian"),
    ],
)
def test_bad_hessians(hessian, message):
    with pytest.raises(ValueError, match=message):
        gptq(torch.randn(16, 64), hessian)


@pytest.mark.parametrize("make", [softmax_model, linear_model])
def test_a_model_loses_less_than_by_nearest_rounding(make):
    model = make()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (4, 64), generator=generator)
    with torch.no_grad():
        exact = model(tokens).logits
    errors = {}
    for name in ("nearest", "gptq"):
        changed = copy.deepcopy(model)
        if name == "gptq":
            gptq_(changed, tokens, group_size=32, progress=False)
        else:
            quantize_(changed, "int4", group_size=32)
        with torch.no_grad():
            errors[name] = float((changed(tokens).logits - exact).square().mean())
        assert perplexity(changed, tokens[0]) > 0
    assert errors["gptq"] < 0.8 * errors["nearest"]


@pytest.mark.parametrize("tokens", [torch.arange(8), torch.randn(2, 8), torch.zeros(0, 8).long()])
def test_bad_calibration(tokens):
    with pytest.raises(ValueError, match=r"gptq_: expected int64 tokens of shape \[B, T\]"):
        gptq_(softmax_model(), tokens, progress=False)


def test_another_kind_of_model():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"gptq_: expected a Hugging Face decoder .* Sequential"):
        gptq_(model, torch.zeros(1, 8).long(), progress=False)


def test_layers_keep_their_own_masks():
    """Qwen2 with one full layer and two sliding ones: each is calibrated under its own mask."""
    model = softmax_model(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=3
    )
    assert len(set(model.config.layer_types)) == 2
    seen = [[] for _ in model.model.layers]
    for layer, masks in zip(model.model.layers, seen, strict=True):
        layer.register_forward_pre_hook(
            lambda _, args, options, masks=masks: masks.append(options["attention_mask"]),
            with_kwargs=True,
        )
    tokens = torch.arange(24)[None] % 50
    model(tokens, use_cache=False)
    assert len({mask is None or int(mask.sum()) for (mask,) in seen}) == 2
    gptq_(model, tokens, group_size=32, progress=False)
    for first, *masks in seen:
        assert len(masks) >= 2
        assert all(mask is first or torch.equal(mask, first) for mask in masks)


def test_a_format_without_a_grid_is_refused():
    w = torch.randn(16, 64)
    with pytest.raises(ValueError, match=r"gptq: expected format in .*'int4', .* got 'nf4'"):
        gptq(w, torch.eye(64), "nf4")
