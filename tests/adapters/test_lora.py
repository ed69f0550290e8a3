"""LoRA on linear layers: the equation, its variants, and several adapters at once."""

import copy
import doctest
import importlib
import pickle
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

import fastweights as fw
from fastweights.adapters import (
    LoRA,
    LoRALinear,
    activate,
    adapter_configs,
    adapter_layers,
    adapter_names,
    disabled,
    per_sample,
)

from .models import VARIANTS, adapted, inputs, model, quantized, shake


def peft_of(ours, name="default", **options):
    """PEFT's model with the parameters of one of our adapters."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=r"layers.*(_proj|up|down)|head",
        use_rslora=options.get("rslora", False), use_dora=options.get("dora", False),
        lora_bias=options.get("lora_bias", False), rank_pattern=options.get("rank_pattern", {}),
        alpha_pattern=options.get("alpha_pattern", {}),
    )  # fmt: skip
    theirs = LoraModel(model().double(), config, "default")
    copy_into(theirs, ours, name)
    return theirs


def copy_into(theirs, ours, name):
    state = {k: v for k, v in ours.state_dict().items() if ".lora_" in k}
    for key, value in state.items():
        path, part, which = key.rsplit(".", 2)
        if which != name:
            continue
        if part == "lora_bias":
            key = f"{path}.lora_B.default.bias"
        else:
            key = f"{path}.{part}.default.weight"
        theirs.get_parameter(f"model.{key}").data.copy_(value)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_are_those_of_peft(options):
    ours = adapted(model().double(), **options)
    shake(ours)
    theirs = peft_of(ours, **options)
    x = inputs().double()
    results = []
    for m in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        y.square().sum().backward()
        gradients = [p.grad.flatten() for p in m.parameters() if p.requires_grad]
        results.append((y.detach(), leaf.grad, gradients))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-9, atol=1e-9)
    ours_sum, theirs_sum = (
        sorted(float(g.abs().sum()) for g in gradients) for _, _, gradients in results
    )
    torch.testing.assert_close(ours_sum, theirs_sum, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_adapter_changes_no_bit(dtype):
    for base in (model().to(dtype), quantized() if dtype == torch.float32 else model().to(dtype)):
        x = inputs().to(dtype)
        expected = base(x)
        assert torch.equal(adapted(base)(x), expected)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_layer_is_its_equation(options):
    torch.manual_seed(0)
    layer = adapted(nn.Sequential(nn.Linear(12, 7).double()), **options)[0]
    shake(layer)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    s = 8 / 2 if options.get("rslora") else 8 / 4
    assert layer.scaling["default"] == s
    x = torch.randn(5, 12, dtype=torch.float64)
    w = layer.base_layer.weight + s * b @ a
    bias = layer.base_layer.bias
    if options.get("dora"):
        w = (layer.lora_magnitude_vector["default"] / w.norm(dim=1)).unsqueeze(1) * w
    if options.get("lora_bias"):
        bias = bias + s * layer.lora_bias["default"]
    torch.testing.assert_close(layer(x), F.linear(x, w, bias), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.delta("default", torch.float64), s * b @ a)
    own = list(layer.own_parameters("default"))

    def function(x, *_):
        return layer(x)

    if not options.get("dora"):  # its norms have no gradient
        assert torch.autograd.gradcheck(function, (x[:2].requires_grad_(), *own))


def test_dora_starts_as_its_base():
    for base in (model(), quantized()):
        x = inputs()
        torch.testing.assert_close(adapted(base, dora=True)(x), base(x))
    layer = adapted(nn.Sequential(nn.Linear(8, 8, bias=False)), dora=True)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), layer[0].base_layer(x))


def test_doras_norm_has_no_gradient():
    layer = adapted(nn.Sequential(nn.Linear(6, 5).double()), dora=True)[0]
    shake(layer)
    (a, b), m = layer.factors("default"), layer.lora_magnitude_vector["default"]
    x, s = torch.randn(4, 6, dtype=torch.float64), layer.scaling["default"]
    w = layer.base_layer.weight
    norm = (w + s * b @ a).norm(dim=1).detach()
    y = m / norm * (x @ w.T + s * x @ a.T @ b.T) + layer.base_layer.bias
    expected = torch.autograd.grad(y.square().sum(), (a, b, m))
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), (a, b, m)), expected)


def test_scaling_a_against_b_changes_nothing():
    ours = adapted()
    shake(ours)
    x = inputs()
    before = ours(x)
    with torch.no_grad():
        for layer in adapter_layers(ours):
            a, b = layer.factors("default")
            a *= 4
            b /= 4
    assert torch.equal(ours(x), before)


def test_only_the_adapter_is_trained():
    ours = adapted(lora_bias=True)
    ours(inputs()).sum().backward()
    for name, p in ours.named_parameters():
        assert p.requires_grad == (".lora_" in name), name
        assert (p.grad is not None) == p.requires_grad, name


def test_adapters_can_be_switched_off():
    base, x = model(), inputs()
    expected = base(x)
    ours = adapted(base)
    shake(ours)
    with disabled(ours):
        assert torch.equal(ours(x), expected)
        with per_sample(ours.eval(), ["default", None]):
            assert torch.equal(ours(x), expected)
    assert not torch.allclose(ours(x), expected)


def test_dropout_is_new_every_time_and_absent_in_evaluation():
    ours, x = adapted(dropout=0.5), inputs(40)
    shake(ours)
    torch.manual_seed(3)
    first, second = ours(x), ours(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(ours(x), first)
    assert torch.equal(ours.eval()(x), adapted_like(ours)(x))
    layer = adapted(nn.Sequential(nn.Linear(32, 3)), dropout=0.5)
    shake(layer)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
        torch.testing.assert_close(mean, layer.eval()(x), atol=0.6, rtol=0)
    adapted(ours.train(), name="b", dropout=0.1)
    activate(ours, ["default", "b"])
    with pytest.raises(ValueError, match=r"to have one dropout, got 0\.1 and 0\.5"):
        ours(x)


def adapted_like(ours):
    other = adapted()
    other.load_state_dict(ours.state_dict())
    return other


def test_the_backward_sees_the_mask_of_the_forward():
    layer = adapted(nn.Sequential(nn.Linear(6, 4).double()), dropout=0.5)[0]
    shake(layer)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def function(x, *_):
        torch.manual_seed(0)
        return layer(x)

    assert torch.autograd.gradcheck(function, (x, *layer.own_parameters("default")))


def test_biases_are_trained_on_request():
    def trained(**options):
        ours = adapted(targets=["v_proj"], **options)
        return {n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n}

    assert trained() == set()
    assert trained(bias="lora_only") == {f"layers.{i}.v_proj.base_layer.bias" for i in (0, 1)}
    every = {n for n, _ in adapted(targets=["v_proj"]).named_parameters() if n.endswith("bias")}
    assert trained(bias="all") == every
    ours = adapted(bias="all")
    with pytest.raises(ValueError, match="adapt: expected bias='none' beside 'default'"):
        adapted(ours, name="b", bias="all")
    assert adapter_names(ours) == ["default"]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_copies_and_files_compute_the_same(options, tmp_path):
    ours, x = adapted(**options), inputs()
    shake(ours)
    expected = ours(x)
    again = adapted_of(options)
    again.load_state_dict(ours.state_dict())
    assert not any("scale" in key for key in ours.state_dict())
    for other in (again, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), expected)
        assert adapter_configs(other) == adapter_configs(ours)
    shake(again)
    assert torch.equal(ours(x), expected)


def adapted_of(options):
    torch.manual_seed(5)
    return adapted(**options)


@pytest.mark.parametrize("name", ["plain", "dora", "lora_bias"])
def test_modules_compile_without_a_break(name):
    options = VARIANTS[name]
    ours, x = adapted(**options), inputs()
    shake(ours)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = ours(x)
    expected.sum().backward()
    gradients = [p.grad for p in ours.parameters() if p.requires_grad]
    ours.zero_grad()
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    again = [p.grad for p in ours.parameters() if p.requires_grad]
    torch.testing.assert_close(again, gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"dora": True}], ids=str)
def test_autocast_keeps_the_adapter_in_float32(options):
    ours, x = adapted(**options), inputs()
    shake(ours)
    exact = ours.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x).float(), exact, rtol=0.1, atol=0.1)
        ours.train()(x).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)


def test_other_dtypes_of_the_base_keep_adapters_in_float32():
    ours, x = adapted(), inputs()
    shake(ours)
    half = adapted(model().bfloat16())
    half.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora_" in k}, strict=False)
    layer = half.layers[0].q_proj
    assert layer.lora_A["default"].dtype == torch.float32
    torch.testing.assert_close(half(x.bfloat16()).float(), ours(x), rtol=0.1, atol=0.1)
    third = fw.adapt(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=3, alpha=1)).bfloat16()
    assert third[0].scale.item() == 1 / 3
    assert adapted(model(), dtype=torch.bfloat16).head.lora_A["default"].dtype == torch.bfloat16


def test_weights_are_found_where_models_look_for_them():
    ours = adapted()
    assert ours.head.weight is ours.head.base_layer.weight
    assert ours.head.bias is ours.head.base_layer.bias


def test_the_wrapper_is_as_its_base_trains():
    base = model().eval()
    adapted(base)
    assert not base.head.training
    assert isinstance(base.head, LoRALinear)


def test_examples_in_docstrings_run():
    for module in pkgutil.iter_modules(fw.adapters.__path__, "fastweights.adapters."):
        results = doctest.testmod(importlib.import_module(module.name))
        assert results.failed == 0, module.name
