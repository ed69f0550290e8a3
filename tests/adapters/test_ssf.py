"""SSF: the equation, its gradients, and merging into every kind of layer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fastweights as fw
from fastweights.adapters import (
    SSF,
    SSFLayer,
    activate,
    adapter_layers,
    disabled,
    merge,
    per_sample,
    push_shift,
    remove,
    unmerge,
)
from tiny_models import softmax_model

from .models import inputs, model, quantized, shake


class Vision(nn.Module):
    """A vision transformer's parts: patches, norms, a block, a head."""

    def __init__(self):
        super().__init__()
        self.patch, self.group = nn.Conv2d(3, 8, 2, stride=2), nn.GroupNorm(2, 8)
        self.batch = nn.BatchNorm2d(8)
        self.norm, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
        self.plain = nn.LayerNorm(8, elementwise_affine=False)
        self.qkv, self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8, False)
        self.head = nn.Linear(8, 3)

    def forward(self, image):
        x = self.batch(self.group(self.patch(image))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + torch.softmax(q @ k.transpose(1, 2), -1) @ v
        x = self.plain(self.rms(x) + self.fc2(torch.relu(self.fc1(x))))
        return self.head(x.mean(1))


CHANNELS = {"patch": 8, "group": 8, "batch": 8, "norm": 8, "rms": 8, "plain": 8}
CHANNELS |= {"qkv": 24, "fc1": 16, "fc2": 8}


def vision():
    torch.manual_seed(0)
    made = Vision().double().eval()
    made.batch.running_mean.normal_()
    return made


def image():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def adapted(base=None, name="default", **options):
    options = {"exclude": ["head"], "modules_to_save": ["head"]} | options
    made = fw.adapt(base or vision(), SSF(**options), name=name)
    shake(made, name)
    return made


def test_every_operation_gets_a_scale_and_a_shift():
    ours = adapted()
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, SSFLayer)}
    assert list(layers) == list(CHANNELS)
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    own = [p for n, p in trained.items() if "ssf_" in n]
    assert sum(p.numel() for p in own) == 2 * sum(CHANNELS.values())
    assert set(trained) - {n for n in trained if "ssf_" in n} == {
        "head.modules_to_save.default.weight",
        "head.modules_to_save.default.bias",
    }
    assert len(list(adapter_layers(adapted(include_norms=False)))) == 5  # with the head's
    only = fw.adapt(vision(), SSF(targets=["fc1"], include_norms=False))
    assert [layer.base_layer for layer in adapter_layers(only)] == [only.fc1.base_layer]


@pytest.mark.parametrize("path", CHANNELS)
def test_the_layer_is_its_equation_with_its_gradients(path):
    ours = adapted()
    layer = getattr(ours, path)
    x = image() if path == "patch" else torch.randn(2, 8, 4, 4).double()
    if path not in ("patch", "group", "batch"):
        x = torch.randn(2, 5, 16 if path == "fc2" else 8).double()
    y = layer.base_layer(x)
    g, b = layer.ssf_scale["default"], layer.ssf_shift["default"]
    view = (1, -1, 1, 1) if y.dim() == 4 else (1, 1, -1)
    out = layer(x)
    torch.testing.assert_close(out, y * g.view(view) + b.view(view), rtol=1e-14, atol=1e-14)
    upstream = torch.randn_like(out)
    axes = [d for d in range(y.dim()) if d != (1 if y.dim() == 4 else 2)]
    dg, db = torch.autograd.grad(out, (g, b), upstream)
    torch.testing.assert_close(dg, (upstream * y).sum(axes).to(g.dtype))
    torch.testing.assert_close(db, upstream.sum(axes).to(b.dtype))


def test_the_start_is_near_the_model_or_exactly_it():
    ours = fw.adapt(nn.Sequential(nn.Linear(8, 4000)), SSF())[0]
    for values, mean in ((ours.ssf_scale["default"], 1.0), (ours.ssf_shift["default"], 0.0)):
        assert abs(values.mean() - mean) < 0.002
        assert abs(values.std() - 0.02) < 0.001
    exact = fw.adapt(vision(), SSF(exact_init=True))
    assert torch.equal(exact(image()), vision()(image()))


def test_merged_is_unmerged():
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        ours, x = adapted(vision().to(dtype)), image().to(dtype)
        expected = ours(x)
        before = {k: v.clone() for k, v in ours.state_dict().items()}
        merge(ours, keep_base=True)
        assert (ours(x) - expected).abs().max() < tolerance * 10
        with disabled(ours):
            assert torch.equal(ours(x), vision().to(dtype)(x))
        unmerge(ours)
        assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        merge(ours)
        assert not list(adapter_layers(ours))
        assert (ours(x) - expected).abs().max() < tolerance * 10


def test_conv1d_and_quantized_layers_are_merged():
    ours, x = fw.adapt(model().double(), SSF()), inputs().double()
    shake(ours)
    expected = ours(x)
    torch.testing.assert_close(merge(ours)(x), expected, rtol=1e-12, atol=1e-12)
    ours, x = fw.adapt(quantized(), SSF()), inputs()
    shake(ours, by=0.05)
    expected = ours(x)
    with pytest.raises(ValueError, match="merge: expected quantized=True to round int8 weights"):
        merge(ours)
    error = (merge(ours, quantized=True)(x) - expected).norm() / expected.norm()
    assert error < 0.02


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, nn.RMSNorm])
def test_the_shift_of_a_norm_moves_on(kind):
    torch.manual_seed(0)
    base = nn.Sequential(kind(8), nn.Linear(8, 5, bias=False), nn.Identity()).double()
    nn.init.normal_(base[0].weight)
    ours, x = fw.adapt(base, SSF()), torch.randn(3, 8).double()
    shake(ours)
    expected = ours(x)
    merge(ours)
    torch.testing.assert_close(ours(x), expected, rtol=1e-6, atol=1e-6)
    assert ours[0].scale is None
    push_shift(ours, "0", into=["1"])
    assert type(ours[0]) is kind
    torch.testing.assert_close(ours(x), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="push_shift: expected 0 to be a norm that a merge left"):
        push_shift(ours, "0", into=["1"])


def test_unknown_norms_keep_both_beside_them():
    class ShiftedRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8).double())

        def forward(self, x):
            return x * torch.sigmoid(self.weight)

    ours, x = fw.adapt(nn.Sequential(ShiftedRMSNorm()), SSF()), torch.randn(3, 8).double()
    shake(ours)
    expected = ours(x)
    torch.testing.assert_close(merge(ours)(x), expected, rtol=1e-14, atol=1e-14)
    assert ours[0].scale is not None


def test_merging_into_bfloat16_loses_no_more_than_a_step():
    """γ multiplies, so the error is relative to the weight and not to the change (LoRA's is)."""
    linear = nn.Linear(64, 64, dtype=torch.bfloat16)
    ours = fw.adapt(nn.Sequential(linear), SSF())
    exact = linear.weight.double() * ours[0].ssf_scale["default"].double().unsqueeze(1)
    merge(ours)
    assert ((ours[0].weight.double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_a_transformer_is_adapted_and_merged():
    llama = softmax_model()
    tokens = torch.randint(96, (2, 7))
    ours = fw.adapt(softmax_model(), SSF())
    sites = [n for n, m in ours.named_modules() if isinstance(m, SSFLayer)]
    assert len(sites) == 2 * 9 + 1
    shake(ours, by=0.05)
    expected = ours(tokens).logits
    assert not torch.allclose(expected, llama(tokens).logits)
    torch.testing.assert_close(merge(ours)(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_samples_meet_their_own_adapters():
    ours, x = adapted(name="a"), torch.randn(3, 3, 8, 8).double()
    adapted(ours, name="b", targets=["fc1"], modules_to_save=[])
    with per_sample(ours.eval(), ["b", None, "a"]):
        y = ours(x)
    for i, name in enumerate(["b", (), "a"]):
        activate(ours, name)
        torch.testing.assert_close(y[i], ours(x)[i])


def test_several_follow_one_another():
    ours, x = adapted(name="a"), torch.randn(3, 8).double()
    adapted(ours, name="b", modules_to_save=[])
    layer = ours.fc1
    activate(ours, ["b", "a"])
    y = layer.base_layer(x) * layer.ssf_scale["b"] + layer.ssf_shift["b"]
    y = y * layer.ssf_scale["a"] + layer.ssf_shift["a"]
    torch.testing.assert_close(layer(x), y)
    expected = ours(image())
    merge(ours)
    torch.testing.assert_close(ours(image()), expected)


def test_copies_files_compilation_and_removal():
    ours, x = adapted(), image()
    expected = ours(x)
    again = fw.adapt(vision(), SSF(exclude=["head"], modules_to_save=["head"]))
    again.load_state_dict(ours.state_dict())
    for other in (again, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(ours.float()(x.float())).all()
    remove(ours, "default")
    torch.testing.assert_close(ours(x.float()), vision().float()(x.float()))


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(TypeError, match="SSF: expected 0 to be a linear layer, a convolution or a"):
        fw.adapt(nn.Sequential(nn.ReLU()), SSF(targets=["0"]))
    ours = adapted()
    with torch.no_grad():
        ours.fc1.ssf_scale["default"][0] = torch.inf
    with pytest.raises(ValueError, match="merge: expected finite adapters"):
        merge(ours)
    with pytest.raises(TypeError, match="push_shift: expected 1 to be a float linear layer"):
        rest = nn.Sequential(nn.RMSNorm(8), nn.ReLU())
        push_shift(merge(fw.adapt(rest, SSF())), "0", into=["1"])
    lora = fw.adapt(vision(), fw.adapters.LoRA(targets=["fc1"]), name="lora")
    with pytest.raises(TypeError, match="SSF: expected fc1 to be a linear layer, a convolution"):
        fw.adapt(lora, SSF())
