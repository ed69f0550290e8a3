"""Layers that read one input: the same numbers together as apart."""

import pytest
import torch
from torch import nn

import fastweights as fw
from fastweights.adapters import LoRA, activate, adapter_layers, together
from fastweights.testing import assert_close

from .models import shake


class Projections(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, size, bias=bias) for size in (32, 8, 8))

    def apart(self, x):
        return [layer(x) for layer in (self.q, self.k, self.v)]

    def forward(self, x):
        return together((self.q, self.k, self.v), x)


def projections(bias=True, **options):
    torch.manual_seed(0)
    ours = fw.adapt(Projections(bias), LoRA(rank=4, alpha=8, **options))
    shake(ours)
    return ours


def calls_of_lora_linear(monkeypatch):
    calls = []
    module = "fastweights.adapters.shared_input.lora_linear"
    monkeypatch.setattr(module, lambda *a, **k: calls.append(k) or fw.lora_linear(*a, **k))
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_together_is_apart(monkeypatch, bias, autocast):
    calls = calls_of_lora_linear(monkeypatch)
    ours = projections(bias)
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, expected = ours(x), ours.apart(x)
    assert [call["split"] for call in calls] == [[32, 8, 8]]
    tolerance = 2e-2 if autocast else 2e-6
    assert_close(got, expected, tolerance=tolerance)
    leaves = [x, *(p for layer in adapter_layers(ours) for p in layer.own_parameters("default"))]
    grads = [torch.randn_like(y) for y in got]
    assert_close(
        torch.autograd.grad(got, leaves, grads),
        torch.autograd.grad(expected, leaves, grads),
        tolerance=tolerance,
    )


def test_a_changed_weight_is_stacked_again():
    ours, x = projections(), torch.randn(2, 24)
    ours(x)
    with torch.no_grad():
        ours.k.base_layer.weight.mul_(3)
    assert_close(ours(x), ours.apart(x), tolerance=2e-6)
    ours.v.base_layer.weight.data = torch.randn(8, 24)
    assert_close(ours(x), ours.apart(x), tolerance=2e-6)


def test_weights_that_do_not_tell_when_they_change(monkeypatch):
    calls, x = calls_of_lora_linear(monkeypatch), torch.randn(2, 24)
    with torch.inference_mode():
        ours = projections()
        assert_close(ours(x), ours.apart(x), tolerance=2e-6)
    assert not calls


def test_memory_that_is_given_to_another_weight():
    ours, x = projections(), torch.randn(2, 24)
    ours(x)
    for _ in range(4):  # frees the weight's memory twice over; an allocator likes to give it back
        ours.k.base_layer.weight.data = torch.randn(8, 24)
        assert_close(ours(x), ours.apart(x), tolerance=2e-6)
        ours.k.base_layer.weight.data = torch.empty(0)
        ours.k.base_layer.weight.data = torch.randn(8, 24)
        assert_close(ours(x), ours.apart(x), tolerance=2e-6)


def test_several_adapters():
    ours, x = projections(), torch.randn(2, 24)
    fw.adapt(ours, LoRA(rank=2, targets=["q", "k", "v"]), name="second")
    shake(ours, "second")
    activate(ours, ["default", "second"])
    assert_close(ours(x), ours.apart(x), tolerance=2e-6)


@pytest.mark.parametrize(
    "options",
    [{"targets": ["q", "k"]}, {"dora": True}, {"dropout": 0.5}, {"lora_bias": True}],
    ids=str,
)
def test_what_is_no_plain_lora_goes_layer_by_layer(monkeypatch, options):
    calls = calls_of_lora_linear(monkeypatch)
    ours, x = projections(**options), torch.randn(2, 24)
    torch.manual_seed(1)
    got = ours(x)
    torch.manual_seed(1)
    expected = ours.apart(x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not calls
