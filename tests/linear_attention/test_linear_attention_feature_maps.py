"""Feature maps: what each promises by its algebra."""

import functools
import math

import pytest
import torch
from torch import nn

import fastweights as fw
import fastweights.nn as fnn
from fastweights.ops.linear_attention.distillation import (
    linear_attention_weights,
    mimicry_loss,
    softmax_attention_weights,
)
from fastweights.ops.linear_attention.feature_maps import FEATURE_MAPS, feature_map
from fastweights.testing import assert_close

SIGNED = {"identity", "elementwise_product"}


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features_are_positive_unless_the_map_is_signed(name: str) -> None:
    features = feature_map(name, 8)(torch.randn(64, 8, generator=torch.Generator().manual_seed(1)))
    smallest = features.min().item()
    if name == "taylor":
        # Its features are signed; the products of two of them, 1 + s + s²/2 ≥ ½, are not.
        assert (features @ features.T).min() >= 0.5 - 1e-6
    else:
        assert (smallest < 0) == (name in SIGNED)


@pytest.mark.parametrize("dim", [1, 5, 16])
def test_taylor_is_exp_to_second_order(dim: int) -> None:
    q, k = torch.randn(2, 33, dim, dtype=torch.float64)
    phi = fnn.TaylorFeatureMap(dim)
    s = q @ k.T / math.sqrt(dim)
    assert phi(q).shape[-1] == 1 + dim + dim * (dim + 1) // 2
    assert_close(phi(q) @ phi(k).T, 1 + s + s.square() / 2, tolerance=1e-13)


def test_elu_map_is_positive_and_continuous() -> None:
    x = torch.tensor([-50.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    expected = torch.tensor([math.exp(-50), math.exp(-1), 1.0, 3.0], dtype=torch.float64)
    assert_close(fnn.EluFeatureMap()(x), expected, tolerance=1e-12)


def test_dpfp_is_products_of_shifted_rectified_entries() -> None:
    x = torch.tensor([1.0, -2.0])
    # r = [1, 0, 0, 2]; r·roll(r, 1) = [1·2, 0·1, 0·0, 2·0]
    assert fnn.DPFPFeatureMap(2, nu=1)(x).tolist() == [2.0, 0.0, 0.0, 0.0]
    assert fnn.DPFPFeatureMap(8, nu=4)(torch.randn(3, 8)).shape == (3, 64)


def test_t2r_and_hadamard_are_their_formulas() -> None:
    x = torch.randn(7, 6)
    t2r = fnn.T2RFeatureMap(6, dot_dim=4, bias=True)
    assert torch.equal(t2r(x), torch.relu(t2r.layer(x)))
    hadamard = fnn.HadamardFeatureMap(6)
    assert torch.equal(hadamard(x), hadamard.layer1(x) * hadamard.layer2(x))


@pytest.mark.parametrize("num_heads", [None, 3])
@pytest.mark.parametrize("norm", ["joint", "separate", "exp"])
def test_hedgehog_normalises_as_it_says(norm: str, num_heads: int | None) -> None:
    phi = fnn.HedgehogFeatureMap(6, num_heads=num_heads, norm=norm)
    features = phi(10 * torch.randn(2, 5, 3, 6))
    assert features.shape == (2, 5, 3, 12)
    assert (features >= 0).all()
    first, second = features.chunk(2, dim=-1)
    one = torch.ones(2, 5, 3)
    if norm == "joint":
        assert_close(features.sum(dim=-1), one, tolerance=1e-6)
    elif norm == "separate":
        assert_close(first.sum(dim=-1), one, tolerance=1e-6)
        assert_close(second.sum(dim=-1), one, tolerance=1e-6)
    else:
        assert torch.equal(first.amax(dim=-1), one)
        assert torch.equal(second.amax(dim=-1), one)


def test_hedgehog_joint_is_fla_s_formula() -> None:
    phi = fnn.HedgehogFeatureMap(4)
    assert torch.equal(phi.layer.weight, torch.eye(4))
    x = torch.randn(9, 4)
    e = torch.cat([2 * x, -2 * x], dim=-1).exp()
    assert_close(phi(x), e / e.sum(dim=-1, keepdim=True), tolerance=1e-6)


def test_hedgehog_survives_large_inputs() -> None:
    for norm in ("joint", "separate", "exp"):
        x = torch.full((1, 4), 1e4).mul(torch.tensor([1.0, -1.0, 0.5, 0.0])).requires_grad_()
        features = fnn.HedgehogFeatureMap(4, norm=norm)(x)
        features.square().sum().backward()
        assert features.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_tied_maps_are_one_module() -> None:
    mixer = fnn.LinearAttention(hidden_size=32, feature_map="hedgehog", tie_feature_map_qk=True)
    assert mixer.feature_map_q is mixer.feature_map_k


def test_weights_are_those_of_the_linear_path() -> None:
    q, k = torch.randn(2, 2, 17, 3, 6, dtype=torch.float64)
    v = torch.randn(2, 17, 3, 5, dtype=torch.float64)
    phi = fnn.HedgehogFeatureMap(6, num_heads=3, norm="separate").double()
    a = linear_attention_weights(phi(q), phi(k))
    o, _ = fw.linear_attention(phi(q), phi(k), v, scale=1.0, normalize=True)
    assert_close(o, torch.einsum("bhij,bjhv->bihv", a, v), tolerance=1e-12)
    p = softmax_attention_weights(q, k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(p @ v, expected, tolerance=1e-12)


def test_mimicry_loss_is_least_at_the_teacher() -> None:
    p = softmax_attention_weights(*torch.randn(2, 1, 6, 2, 4, dtype=torch.float64))
    entropy = -(p * p.clamp(min=1e-300).log()).sum(dim=-1).mean()
    other = softmax_attention_weights(*torch.randn(2, 1, 6, 2, 4, dtype=torch.float64))
    assert_close(mimicry_loss(p, p), entropy, tolerance=1e-12)
    assert mimicry_loss(p, other) > entropy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fnn.HedgehogFeatureMap(4, norm="softmax"),
            r'HedgehogFeatureMap: expected norm "joint", "separate" or "exp", got \'softmax\'',
        ),
        (
            lambda: fnn.HedgehogFeatureMap(4, 8, init="identity"),
            r"HedgehogFeatureMap: expected feature_dim = head_dim = 4 for the identity init, got 8",
        ),
        (
            lambda: fnn.HedgehogFeatureMap(4, num_heads=2, bias=True),
            r"HedgehogFeatureMap: expected bias=False with num_heads",
        ),
        (lambda: fnn.DPFPFeatureMap(2, nu=4), r"DPFPFeatureMap: expected 1 <= nu < 4, got 4"),
        (lambda: feature_map("cosine", 4), r"feature_map: expected one of elu"),
    ],
)
def test_bad_arguments_say_what_was_expected(make: functools.partial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
