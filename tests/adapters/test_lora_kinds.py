"""LoRA on embeddings and convolutions, beside PEFT."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

import fastweights as fw
from fastweights.adapters import (
    LoRA,
    LoRAConv,
    LoRAEmbedding,
    activate,
    adapter_layers,
    merge,
    per_sample,
    unmerge,
)

from .models import shake


def embedding():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=3)).double()


def convolution(kind=nn.Conv2d, **options):
    torch.manual_seed(0)
    options = {"padding": 1, "stride": 2} | options
    return nn.Sequential(kind(4, 6, 3, **options)).double()


BASES = {
    "embedding": embedding,
    "conv1d": lambda: convolution(nn.Conv1d),
    "conv2d": convolution,
    "conv2d without bias": lambda: convolution(bias=False),
    "conv3d": lambda: convolution(nn.Conv3d),
}
GROUPED = {"groups": lambda: convolution(groups=2)}
OPTIONS = {"plain": {}, "dora": {"dora": True}, "rslora": {"rslora": True}}


def given(base):
    torch.manual_seed(1)
    layer = base[0]
    if isinstance(layer, nn.Embedding):
        return torch.randint(11, (3, 5))
    return torch.randn(3, 4, *[7] * len(layer.kernel_size), dtype=torch.float64)


def adapted(base, name="default", **options):
    made = fw.adapt(base, LoRA(rank=2, alpha=4, targets=["0"], **options), name=name)
    shake(made, name)
    return made


def peft_of(ours, base, **options):
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["0"], use_dora=options.get("dora", False),
        use_rslora=options.get("rslora", False), lora_bias=options.get("lora_bias", False),
    )  # fmt: skip
    theirs = LoraModel(base, config, "default")
    for key, value in ours.state_dict().items():
        if ".lora_" in key:
            path, part, _ = key.rsplit(".", 2)
            end = "" if "embedding" in part else ".weight"
            name = f"model.{path}.{part}.default{end}"
            if part == "lora_bias":
                name = f"model.{path}.lora_B.default.bias"
            parameter = theirs.get_parameter(name)
            assert parameter.shape == value.shape
            parameter.data.copy_(value)
    return theirs


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", (BASES | GROUPED).values(), ids=BASES | GROUPED)
def test_outputs_and_gradients_are_those_of_peft(make, options):
    if make in GROUPED.values() and "dora" in options:
        with pytest.raises(ValueError, match="expected a convolution without groups for DoRA"):
            adapted(make(), **options)
        return
    ours = adapted(make(), **options)
    theirs = peft_of(ours, make(), **options)
    x = given(make())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    for m in (ours, theirs):
        m(x).square().sum().backward()
    gradients = [
        {p.shape: p.grad for p in m.parameters() if p.requires_grad} for m in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_biases_of_convolutions_are_those_of_peft():
    ours = adapted(convolution(), lora_bias=True)
    theirs = peft_of(ours, convolution(), lora_bias=True)
    x = given(convolution())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_merged_is_unmerged(make, options):
    if "lora_bias" in options and make is embedding:
        with pytest.raises(TypeError, match="expected lora_bias=False for LoRAEmbedding at 0"):
            adapted(make(), **options)
        return
    ours, x = adapted(make(), **options), given(make())
    expected, before = ours(x), ours.state_dict()["0.base_layer.weight"].clone()
    merge(ours, keep_base=True)
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)
    unmerge(ours)
    assert torch.equal(ours.state_dict()["0.base_layer.weight"], before)
    merge(ours)
    assert type(ours[0]) is type(make()[0])
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", (BASES | GROUPED).values(), ids=BASES | GROUPED)
def test_a_fresh_adapter_changes_no_bit(make):
    for options in ({}, {"dora": True}):
        if make in GROUPED.values() and options:
            continue
        ours = fw.adapt(make(), LoRA(rank=2, targets=["0"], **options))
        x = given(make())
        torch.testing.assert_close(ours(x), make()(x), rtol=1e-12, atol=1e-12)
        if not options:
            assert torch.equal(ours(x), make()(x))


def test_an_embedding_starts_the_other_way_around():
    layer = fw.adapt(nn.Sequential(nn.Embedding(500, 40)), LoRA(targets=["0"]))[0]
    assert isinstance(layer, LoRAEmbedding)
    a, b = layer.factors("default")
    assert a.shape == (8, 500)
    assert not a.any()
    assert abs(b.std() - 1) < 0.15
    a, b = fw.adapt(nn.Sequential(nn.Embedding(500, 40)), LoRA(targets=["0"], init="random"))[
        0
    ].factors("default")
    assert abs(a.std() - 1) < 0.1


@pytest.mark.parametrize("make", (BASES | GROUPED).values(), ids=BASES | GROUPED)
def test_samples_meet_their_own_adapters(make):
    ours, x = adapted(make(), name="a"), given(make())
    adapted(ours, name="b")
    with per_sample(ours.eval(), ["b", None, "a"]):
        y = ours(x)
    for i, name in enumerate(["b", (), "a"]):
        activate(ours, name)
        torch.testing.assert_close(y[i], ours(x)[i])
    activate(ours, ["a", "b"])
    total = ours(x)
    activate(ours, "a")
    one = ours(x)
    activate(ours, "b")
    torch.testing.assert_close(total, one + ours(x) - make()(x))


@pytest.mark.parametrize("make", (BASES | GROUPED).values(), ids=BASES | GROUPED)
def test_copies_and_compiled_modules_compute_the_same(make):
    ours, x = adapted(make()), given(make())
    expected = ours(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_convolutions_pad_as_their_base_does(mode):
    base = convolution(padding_mode=mode, stride=1, dilation=2, padding=2)
    x = given(base)
    ours = adapted(base)
    layer = ours[0]
    expected = nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode=mode).double()
    delta = layer.delta("default", torch.float64).view_as(layer.weight)
    expected.weight.data = layer.base_layer.weight + delta
    expected.bias.data = layer.base_layer.bias
    torch.testing.assert_close(ours(x), expected(x))


def test_dropout_of_convolutions_is_for_training():
    ours, x = adapted(convolution(), dropout=0.5), given(convolution())
    assert not torch.equal(ours(x), ours(x))
    assert torch.equal(ours.eval()(x), ours(x))


def test_embeddings_that_are_scaled_scale_the_update():
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0, dtype=torch.float64)

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    ours = adapted(nn.Sequential(Scaled(11, 6, dtype=torch.float64)))
    x = given(embedding())
    expected = ours(x)
    merge(ours)
    assert type(ours[0]) is Scaled
    torch.testing.assert_close(ours(x), expected)


def test_padding_rows_get_no_gradient():
    ours = adapted(embedding())
    ours(torch.tensor([[3, 4]])).sum().backward()
    gradient = ours[0].lora_embedding_A["default"].grad
    assert not gradient[:, 3].any()
    assert gradient[:, 4].any()


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="expected a rank that the 2 groups divide, got 3"):
        fw.adapt(convolution(groups=2), LoRA(rank=3, targets=["0"]))
    with pytest.raises(TypeError, match=r"nn\.Embedding without max_norm"):
        fw.adapt(nn.Sequential(nn.Embedding(3, 4, max_norm=1.0)), LoRA(targets=["0"]))
    grouped = adapted(convolution(groups=2))
    assert isinstance(grouped[0], LoRAConv)
    with pytest.raises(ValueError, match="expected a convolution without groups for DoRA and me"):
        merge(grouped)
    assert next(adapter_layers(grouped)).used == ("default",)
