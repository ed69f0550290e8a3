"""Weighted combinations of adapters, beside PEFT's, and LoRA+."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraModel
from peft.utils import merge_utils
from torch import nn

import fastweights as fw
from fastweights.adapters import (
    LoRA,
    activate,
    adapter_layers,
    adapter_names,
    combine,
    lora_plus_groups,
)
from fastweights.adapters.combine import KINDS, mix

from .models import adapted, inputs, model, shake

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.5}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Embedding(13, 8), nn.Linear(8, 12)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(12)

    def forward(self, x, image):
        return self.norm(self.up(self.embed(x))).sum() + self.conv(image).square().sum()


def small():
    torch.manual_seed(0)
    return Small()


TARGETS = ["embed", "up", "conv"]
IMAGE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def three(ranks=(3, 3, 3), **options):
    """Three adapters of one model, ours and PEFT's."""
    ours, theirs = small(), None
    for i, (name, rank) in enumerate(zip(WEIGHTS, ranks, strict=True)):
        chosen = TARGETS if name != "b" else TARGETS[1:]
        fw.adapt(ours, LoRA(rank=rank, alpha=2 + i, targets=chosen, **options), name=name)
        shake(ours, name)
        config = LoraConfig(r=rank, lora_alpha=2 + i, target_modules=chosen)
        if theirs is None:
            theirs = LoraModel(small(), config, name)
        else:
            theirs.peft_config[name] = config
            theirs.inject_adapter(theirs.model, name)
    for key, value in ours.state_dict().items():
        if ".lora_" in key:
            end = "" if "embedding" in key else ".weight"
            theirs.get_parameter(f"model.{key}{end}").data.copy_(value)
    return ours, theirs


CASES = [(kind, {}) for kind in KINDS if "dare" not in kind]
CASES += [(kind, {"majority": "frequency"}) for kind in ("ties", "ties_svd")]
CASES += [("svd", {"clamp": 0.9}), ("svd", {"rank": 2}), ("ties_svd", {"rank": 2})]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_combinations_are_those_of_peft(kind, options):
    ours, theirs = three((3, 2, 4) if kind in ("cat", "svd") else (3, 3, 3))
    renamed = {"majority": "majority_sign_method", "clamp": "svd_clamp", "rank": "svd_rank"}
    density = {"density": 0.6} if kind not in ("cat", "svd", "linear") else {}
    combine(ours, WEIGHTS, name="all", kind=kind, **options, **density)
    theirs.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "all", kind, **density,
        **{renamed[k]: v for k, v in options.items()},
    )  # fmt: skip
    theirs.set_adapter("all")
    assert set(adapter_names(ours)) == {*WEIGHTS, "all"}
    assert next(adapter_layers(ours)).active == ("c",)
    for key in TARGETS:
        layer, other = getattr(ours, key), getattr(theirs.model, key)
        expected = other.get_delta_weight("all")
        expected = expected.T if key == "embed" else expected.flatten(1)
        torch.testing.assert_close(layer.delta("all"), expected, rtol=1e-4, atol=1e-5)
        a = other.lora_A["all"].weight if key != "embed" else other.lora_embedding_A["all"]
        assert layer.factors("all")[0].shape == a.shape
        assert not layer.factors("all")[0].requires_grad
    activate(ours, "all", trainable=False)
    x = torch.arange(6).view(2, 3)
    torch.testing.assert_close(ours(x, IMAGE), theirs(x, IMAGE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_mixtures_are_those_of_peft_with_their_chances(kind, majority):
    tensors, weights = list(torch.randn(3, 6, 5)), [0.7, -0.4, 1.5]
    theirs = getattr(merge_utils, "task_arithmetic" if kind == "linear" else kind)
    settings = [] if kind == "linear" else [0.5]
    settings += [majority] if "ties" in kind else []
    torch.manual_seed(0)
    expected = theirs(tensors, torch.tensor(weights), *settings)
    torch.manual_seed(0)
    torch.testing.assert_close(mix(kind, tensors, weights, 0.5, majority), expected)


def test_dare_is_right_on_average():
    ours, _ = three()
    torch.manual_seed(0)
    for i in range(200):
        combine(
            ours, {"a": 1.0, "c": -0.5}, name=f"x{i}", kind="dare_linear_svd", density=0.5, rank=8
        )
    layer = ours.up
    mean = sum(layer.delta(f"x{i}") for i in range(200)) / 200
    exact = layer.delta("a") - 0.5 * layer.delta("c")
    assert (mean - exact).norm() / exact.norm() < 0.15


def test_a_concatenation_is_exact():
    ours = adapted(model().double(), name="a")
    adapted(ours, name="b", rank=2, targets=["up", "down"])
    shake(ours, "a")
    shake(ours, "b")
    combine(ours, {"a": 2.0, "b": -1.0}, name="c", kind="cat")
    for layer in adapter_layers(ours):
        exact = 2 * layer.delta("a", torch.float64)
        if "b" in layer.configs:
            exact = exact - layer.delta("b", torch.float64)
        torch.testing.assert_close(layer.delta("c", torch.float64), exact)
    assert ours.head.lora_A["c"].shape[0] == ours.layers[0].up.lora_A["c"].shape[0] == 6
    activate(ours, "c")
    before = copy.deepcopy(ours)(inputs().double())
    assert torch.isfinite(before).all()


def test_one_adapter_is_scaled():
    ours, theirs = three()
    combine(ours, {"a": -0.5}, name="less")
    theirs.add_weighted_adapter(["a"], [-0.5], "less", "svd")
    torch.testing.assert_close(ours.up.delta("less"), theirs.model.up.get_delta_weight("less"))
    torch.testing.assert_close(ours.up.delta("less"), -0.5 * ours.up.delta("a"))


def test_combinations_that_cannot_be_are_refused():
    ours, _ = three((3, 2, 4))
    for options, message in (
        ({"kind": "mean"}, r"expected kind in .* got 'mean'"),
        ({"majority": "most"}, r"expected majority in .* got 'most'"),
        ({"kind": "ties"}, "expected 0 < density <= 1 with 'ties', got None"),
        ({"kind": "dare_linear_svd", "density": 0.0}, "expected 0 < density <= 1"),
        ({"kind": "linear"}, r"expected one rank at embed with 'linear', got \[3, 4\]"),
        ({"weights": {}}, "expected the weight of at least one adapter"),
        ({"weights": {"z": 1.0}}, r"expected names of adapters in .* got 'z'"),
    ):
        with pytest.raises(ValueError, match=f"combine: {message}"):
            combine(ours, options.pop("weights", WEIGHTS), name="all", **options)
    with pytest.raises(ValueError, match="expected a name other than"):
        combine(ours, WEIGHTS, name="a")
    assert set(adapter_names(ours)) == set(WEIGHTS)
    turned = adapted(dora=True)
    with pytest.raises(ValueError, match="expected adapters without DoRA, lora_bias and modules"):
        combine(turned, {"default": 1.0}, name="x")


def test_rates_are_those_of_lora_plus():
    ours, theirs = small(), small()
    targets = ["up", "conv", "embed"]
    fw.adapt(ours, LoRA(rank=2, targets=targets, lora_bias=False, modules_to_save=["norm"]))
    peft = LoraModel(theirs, LoraConfig(r=2, target_modules=targets), "default")
    theirs.norm.requires_grad_(True)
    optimizer = create_loraplus_optimizer(
        peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1
    )

    def rates(groups):
        return sorted(
            (tuple(p.shape), group["lr"], group["weight_decay"])
            for group in groups
            for p in group["params"]
        )

    groups = lora_plus_groups(ours, 1e-3, 8, weight_decay=0.1)
    assert rates(groups) == rates(optimizer.param_groups)
    torch.optim.AdamW(groups)
    with pytest.raises(ValueError, match="lora_plus_groups: expected ratio > 0, got 0"):
        lora_plus_groups(ours, 1e-3, 0)
    with pytest.raises(ValueError, match="expected a model with something to train"):
        lora_plus_groups(small().requires_grad_(False), 1e-3)
