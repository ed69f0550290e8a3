"""What a state of one size recalls, before any training: the table of the MQAR sheet.

n random keys of length one are stored with unit values out of 256 words and asked for again; the
answer is the nearest word. The figures are averages of 100 draws.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fastweights as fw
from fastweights import nn as fnn

WORDS, V, DRAWS = 256, 64, 100


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def softmax(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=math.sqrt(k.shape[-1]))


def recurrent(rule):
    """A mixer that is told everything first, and then asked without being told anything."""

    def recall(q, k, v):
        asked, told = torch.zeros_like(q), torch.zeros_like(k)
        q, k, v = (
            torch.cat(x, dim=1)[:, :, None]
            for x in ((told, q), (k, asked), (v, v.new_zeros(*asked.shape[:2], v.shape[-1])))
        )
        o, _ = rule(q, k, v)
        return o[:, told.shape[1] :, 0]

    return recall


def taylor(q, k, v):
    feature_map = fnn.TaylorFeatureMap(k.shape[-1])
    q, k = (feature_map(math.sqrt(x.shape[-1]) * x) for x in (q, k))
    return fw.linear_attention(q, k, v)


MIXERS = {
    "linear": recurrent(fw.linear_attention),
    "decay": recurrent(lambda q, k, v: fw.linear_attention(q, k, v, torch.tensor([0.97]).log())),
    "taylor": recurrent(taylor),
    "delta": recurrent(fw.delta_rule),
    "softmax": softmax,
}


def accuracy(mixer, K, n, overwritten=False):
    generator = torch.Generator().manual_seed(0)
    keys = unit(torch.randn(DRAWS, n, K, generator=generator))
    words = unit(torch.randn(DRAWS, WORDS, V, generator=generator))
    outdated, current = torch.randint(WORDS, (2, DRAWS, n), generator=generator)
    stored = torch.cat([outdated, current], dim=1) if overwritten else current
    values = words.gather(1, stored[..., None].expand(-1, -1, V))
    told = keys.repeat(1, 2, 1) if overwritten else keys
    answers = MIXERS[mixer](keys, told, values) @ words.mT
    return (answers.argmax(dim=-1) == current).double().mean().item()


def assert_is(measured, expected, n):
    """The sheet's figure: half a unit of its last digit, and three standard errors."""
    rounding = 0.0005 if expected == 0.999 else 0.005
    error = math.sqrt(expected * (1 - expected) / (DRAWS * n))
    assert measured == pytest.approx(expected, abs=rounding + 3 * error)


@pytest.mark.parametrize(
    "mixer, K, n, expected",
    [
        ("linear", 64, 32, 1.00),
        ("linear", 64, 64, 0.999),
        ("linear", 64, 128, 0.96),
        ("linear", 16, 16, 0.99),
        ("linear", 16, 32, 0.94),
        ("taylor", 16, 16, 1.00),
        ("taylor", 16, 32, 1.00),
        ("softmax", 64, 128, 1.00),
        ("softmax", 16, 32, 1.00),
        ("delta", 64, 64, 0.90),  # keys that are not orthogonal push earlier values out
    ],
)
def test_keys_written_once(mixer, K, n, expected):
    assert_is(accuracy(mixer, K, n), expected, n)


@pytest.mark.parametrize(
    "mixer, n, expected",
    [
        ("linear", 64, 0.48),  # both values, with equal weight
        ("softmax", 64, 0.50),
        ("decay", 32, 0.99),
        ("decay", 128, 0.40),
        ("delta", 32, 0.99),
        ("delta", 64, 0.87),
    ],
)
def test_keys_written_twice(mixer, n, expected):
    assert_is(accuracy(mixer, 64, n, overwritten=True), expected, n)


@pytest.mark.parametrize("mixer", ["linear", "delta"])
@pytest.mark.parametrize("n", [16, 64])
def test_orthonormal_keys_are_exact(mixer, n):
    generator = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(4, 64, n, generator=generator, dtype=torch.float64))[0].mT
    values = torch.randn(4, n, V, generator=generator, dtype=torch.float64)
    assert_close(MIXERS[mixer](keys, keys, values) * 8, values)  # the scale is 64 ** -0.5
