"""Several adapters on one model: which count, for which sample, and how they leave."""

import pytest
import torch
from torch import nn

import fastweights as fw
from fastweights.adapters import (
    LoRA,
    LoRALinear,
    SavedModule,
    activate,
    adapter_layers,
    adapter_names,
    disabled,
    merge,
    per_sample,
    remove,
)

from .models import adapted, inputs, model, shake, two


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"lora_bias": True}], ids=str)
def test_active_adapters_add_up(options):
    ours, x = two(**options), inputs()
    assert adapter_names(ours) == ["a", "b"]
    assert next(adapter_layers(ours)).active == ("b",)
    for layer in adapter_layers(ours):
        h = torch.randn(3, layer.in_features)
        results = {}
        for names in ((), "a", "b", ("a", "b")):
            activate(ours, names)
            results[names] = layer(h)
        total = results["a"] + results["b"] - results[()]
        torch.testing.assert_close(results[("a", "b")], total, rtol=1e-4, atol=1e-5)
    activate(ours, ["a", "b"])
    if not options:
        joined = fw.adapt(model(), LoRA(rank=6, alpha=6))
        with torch.no_grad():
            for one, both in zip(adapter_layers(joined), adapter_layers(ours), strict=True):
                parts = [both.matrices(name, torch.float32) for name in both.used]
                one.lora_A["default"][: sum(len(a) for a, _ in parts)] = torch.cat(
                    [a for a, _ in parts]
                )
                stacked = torch.cat([b for _, b in parts], 1)
                one.lora_B["default"][:, : stacked.shape[1]] = stacked
        torch.testing.assert_close(ours(x), joined(x))


def test_activation_decides_what_is_trained():
    ours = two()
    for names in ("a", ("a", "b"), ()):
        activate(ours, names)
        for key, p in ours.named_parameters():
            assert p.requires_grad == (".lora_" in key and key.rsplit(".", 1)[1] in names)
    activate(ours, ["a"], trainable=False)
    assert not any(p.requires_grad for p in ours.parameters())
    with pytest.raises(ValueError, match=r"activate: expected names of adapters in .* got 'c'"):
        activate(ours, ["a", "c"])


@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "modules_to_save": ["head"]}], ids=str)
def test_samples_meet_their_own_adapters(options):
    ours = adapted(name="a", **options)
    adapted(ours, name="b", targets=["q_proj", "down"])
    shake(ours, "a")
    shake(ours, "b")
    ours.eval()
    names = ["a", None, "b", "a", "b"]
    x = inputs(5, 3)
    with per_sample(ours, names):
        y = ours(x)
    assert torch.equal(ours(x), fresh(ours, "b", x))
    for i, name in enumerate(names):
        torch.testing.assert_close(y[i], fresh(ours, name, x)[i], rtol=1e-5, atol=1e-6)


def fresh(ours, name, x):
    activate(ours, name or ())
    y = ours(x)
    activate(ours, "b")
    return y


def test_samples_are_refused_where_they_cannot_be():
    ours = adapted()
    for refused, name, message in (
        (ours, "default", "expected a model in evaluation mode"),
        (adapted().eval(), "x", r"expected names of adapters in \['default'\], got 'x'"),
        (adapted(dora=True).eval(), "default", "expected adapters without DoRA, got 'default'"),
    ):
        with pytest.raises(ValueError, match=f"per_sample: {message}"):
            per_sample(refused, [name]).__enter__()
    ours.eval()
    with per_sample(ours, ["default"] * 3), pytest.raises(RuntimeError, match="expected indices"):
        ours(inputs(2, 3))


def test_saved_modules_are_copies_that_are_trained():
    base, x = model(), inputs()
    ours = adapted(base, modules_to_save=["head"])
    assert isinstance(ours.head, SavedModule)
    assert all(p.requires_grad for p in ours.head.modules_to_save.parameters())
    assert not any(p.requires_grad for p in ours.head.original_module.parameters())
    before = ours(x)
    shake(ours)
    assert not torch.allclose(ours(x), before)
    with disabled(ours):
        assert torch.equal(ours(x), before)
    adapted(ours, name="c")  # all linear layers that are not saved ones
    assert not isinstance(ours.head, LoRALinear)
    adapted(ours, name="b", modules_to_save=["head"])
    with pytest.raises(ValueError, match="expected at most one adapter with modules_to_save"):
        activate(ours, ["default", "b"])
    activate(ours, "default")
    expected = ours(x)
    merge(ours)
    assert type(ours.head) is nn.Linear
    torch.testing.assert_close(ours(x), expected)


def test_names_are_checked():
    ours = adapted()
    for name in ("", "a.b", "keys", "training", "forward"):
        with pytest.raises(ValueError, match="adapt: expected a name without dots"):
            adapted(ours, name=name)
    with pytest.raises(ValueError, match=r"adapt: expected a name other than \['default'\]"):
        adapted(ours)


def test_a_failed_adapt_leaves_the_model_as_it_was():
    base = model()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(TypeError, match=r"expected layers\.1 to be"):
        fw.adapt(base, LoRA(targets=["q_proj", "layers.1"]))
    assert [name for name, _ in base.named_modules()] == names


def test_adapters_can_be_removed():
    ours, x = two(), inputs()
    activate(ours, "a")
    expected = ours(x)
    remove(ours, "b")
    assert torch.equal(ours(x), expected)
    assert adapter_names(ours) == ["a"]
    assert not any(key.endswith(".b") for key in ours.state_dict())
    remove(ours, "a")
    assert not list(adapter_layers(ours))
    assert torch.equal(ours(x), model()(x))
    with pytest.raises(ValueError, match=r"remove: expected one of \[\], got 'a'"):
        remove(ours, "a")


def test_what_an_adapter_trains_whole_is_not_quantized():
    ours = fw.adapt(model(), LoRA(rank=2, targets=["q_proj"], modules_to_save=["head"]))
    fw.quantize_(ours, "int8", group_size=32)
    assert isinstance(ours.head.original_module, fw.nn.QuantizedLinear)
    assert type(ours.head.modules_to_save["default"]) is nn.Linear
    ours(inputs()).sum().backward()
    assert ours.head.modules_to_save["default"].weight.grad is not None
