"""The report on norms of queries and keys, and the rank of attention that they decide."""

import itertools
import math

import pytest
import torch
from torch import nn

import fastweights as fw
from fastweights.adapters import LoRA, adapter_layers, lora_norm_report
from fastweights.adapters.norms import polynomial_attention
from tiny_models import softmax_model

from .models import shake

TOKENS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))


def adapted():
    model = fw.adapt(softmax_model(), LoRA(rank=4, targets=["q_proj", "v_proj"]))
    shake(model)
    return model


def test_the_report_is_what_the_projections_give():
    model = adapted()
    seen = {}
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(
            lambda m, args, y, name=name: seen.__setitem__(name, (args[0], y))
        )
    report = lora_norm_report(model, TOKENS)
    assert [n.path for n in report] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    norms = report.layers[1]
    (x, q), (_, k) = seen["q_proj"], seen["k_proj"]
    bare = attention.q_proj.base_layer(x)
    expected = {
        "query": bare, "adapted_query": q, "query_update": q - bare, "key": k, "adapted_key": k,
    }  # fmt: skip
    for name, values in expected.items():
        assert abs(getattr(norms, name) / values.abs().max().item() - 1) < 1e-5, name
    assert norms.key_update == 0
    assert norms.tokens == 20
    largest = max(norms.adapted_query, norms.adapted_key)
    assert math.isclose(norms.ratio, largest / math.sqrt(math.log(20)))
    heads = q.unflatten(-1, (4, 16)), k.unflatten(-1, (2, 16)).repeat_interleave(2, 2)
    logits = torch.einsum("bthd,bshd->bhts", *heads) / 4
    torch.testing.assert_close(norms.logits, (logits.min().item(), logits.max().item()))
    assert len(str(report).splitlines()) == 2 + 2  # heads, a rule, layers


def test_the_report_is_of_the_product_of_a_and_b():
    model = adapted()
    before = lora_norm_report(model, {"input_ids": TOKENS})
    with torch.no_grad():
        for layer in adapter_layers(model):
            a, b = layer.factors("default")
            a *= 8
            b /= 8
    assert lora_norm_report(model, {"input_ids": TOKENS}) == before


def test_what_cannot_be_found_is_an_error():
    with pytest.raises(ValueError, match=r"lora_norm_report: expected projections .* found none"):
        lora_norm_report(nn.Linear(4, 4), torch.ones(1, 2, 4))
    pair = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="expected head_dim, which the model has not"):
        lora_norm_report(pair, torch.ones(1, 2, 4))
    q = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match="polynomial_attention: expected degree >= 0"):
        polynomial_attention(q, q, q, -1)


def test_the_error_of_low_rank_grows_sharply_with_the_logits():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 128, 8).double()
    logits = q @ k.T / math.sqrt(8)
    q = q / logits.abs().max()

    def error(bound, degree):
        exact = torch.softmax(bound * q @ k.T / math.sqrt(8), -1) @ v
        return float((polynomial_attention(bound * q, k, v, degree) - exact).norm() / exact.norm())

    for degree in (2, 4, 8):
        errors = [error(bound, degree) for bound in (0.5, 1, 2, 4, 8, 16)]
        assert all(low < high for low, high in itertools.pairwise(errors))
        assert errors[2] > 2**degree * errors[0]  # of order bound^(degree + 1)
    assert error(1.0, 4) < 1e-3
    assert error(16.0, 4) > 0.3
    assert error(16.0, 40) < 1e-3
