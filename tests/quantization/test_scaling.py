"""Scales moved between layers, and the two solvers that move them: AWQ and SmoothQuant+."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fastweights import quantize_
from fastweights.functional import dequantize
from fastweights.nn import QuantizedLinear
from fastweights.quantization import AWQ, GPTQ, RoundToNearest, SmoothQuantPlus
from fastweights.quantization.awq import scaling_of
from fastweights.quantization.round_to_nearest import round_to_nearest
from fastweights.quantization.samples import read_samples
from fastweights.quantization.scaling import Fold, find_folds, fold_scale
from fastweights.quantization.smoothquant_plus import smoothing_scale
from fastweights.quantization.walk import Walk
from tiny_models import SIZES, linear_model, softmax_model

TARGET = {"format": "int4", "group_size": 32, "activation": "float"}
TOKENS = torch.randint(SIZES["vocab_size"], (3, 24), generator=torch.Generator().manual_seed(0))
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = [
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
]


def outlier_model(kind="llama"):
    """Channels of the residual stream that norms make large, as in trained models."""
    model = softmax_model(kind)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::16] *= 30
    return model


def blocks(model, calibration):
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    return Walk(model, names, read_samples(calibration), TARGET).blocks()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, nn.Linear])
def test_moving_a_scale_changes_nothing(kind, bias):
    torch.manual_seed(0)
    before = {
        nn.LayerNorm: lambda: nn.LayerNorm(48, bias=bias),
        nn.RMSNorm: lambda: nn.RMSNorm(48),
        nn.Linear: lambda: nn.Linear(48, 48, bias=bias),
    }[kind]()
    readers = [nn.Linear(48, 16), nn.Linear(48, 8, bias=False)]
    x, scale = torch.randn(20, 48), torch.logspace(-2, 2, 48)
    exact = [reader(before(x)) for reader in readers]
    storage = before.weight.data
    kept = storage.clone()
    fold_scale(before, readers, scale)
    for reader, y in zip(readers, exact, strict=True):
        torch.testing.assert_close(reader(before(x)), y, atol=1e-5, rtol=1e-4)
    assert torch.equal(storage, kept)  # a new tensor took its place
    assert not torch.equal(before.weight, kept)


def test_what_can_be_folded_in_a_decoder_layer():
    """Queries share keys and values, so the value projection's rows are no channels of o_proj."""
    (block, _) = blocks(softmax_model(), TOKENS)
    assert find_folds(block) == [Fold("input_layernorm", QKV), *MLP]
    model = softmax_model(num_key_value_heads=4)
    (block, _) = blocks(model, TOKENS)
    value = Fold("self_attn.v_proj", ("self_attn.o_proj",))
    assert find_folds(block) == [Fold("input_layernorm", QKV), value, *MLP]


class Oddities(nn.Module):
    """Norms whose output something else reads, or whose weight is not what it multiplies by."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        h = self.norm(x)
        y = self.up(h)
        y = {"relu": torch.relu, "gelu": nn.functional.gelu}.get(self.kind, torch.tanh)(y)
        y = self.down(y)
        return y + h if self.kind == "read twice" else y


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("relu", [Fold("norm", ("up",)), Fold("up", ("down",))]),
        ("gelu", [Fold("norm", ("up",))]),
        ("read twice", []),
    ],
)
def test_what_can_be_folded_elsewhere(kind, expected):
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([Oddities(kind)])
    model.forward = lambda x: model.layers[0](x)
    (block,) = blocks(model, torch.randn(2, 5, 32))
    assert find_folds(block) == expected


class Layer(nn.Module):
    """A norm, which a scale can be moved out of, and two layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[::8] *= 20

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tied(nn.Module):
    """Two layers that have something in common; or one that runs twice."""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])
        first, second = self.layers
        if what == "layer":
            self.layers[1] = first
        elif what.endswith(".weight"):
            name = what.removesuffix(".weight")
            getattr(second, name).weight = getattr(first, name).weight
        else:
            setattr(second, what, getattr(first, what))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("what", ["norm", "up", "norm.weight", "up.weight", "down.weight", "layer"])
@pytest.mark.parametrize("solver", [AWQ(steps=4), SmoothQuantPlus(alphas=(0.5,))])
def test_what_blocks_share_is_not_scaled(solver, what):
    x, model = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)), Tied(what)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    first = next(Walk(model, names, read_samples(x), TARGET).blocks())
    norm, up = Fold("norm", ("up",)), Fold("up", ("down",))
    assert find_folds(first) == {"layer": [norm, up], "down.weight": [norm]}.get(
        what, [up] if what.startswith("norm") else []
    )
    exact = model(x).detach()
    quantize_(model, "int8", group_size=32, solver=solver, calibration=x, progress=False)
    assert (model(x) - exact).abs().max() < 0.02 * exact.abs().max()


@dataclass
class Opaque:
    y: torch.Tensor


def test_outputs_that_nobody_can_look_into():
    """Nothing can be compared, so no trial could fail."""
    model = nn.Module()
    model.layers = nn.ModuleList([Layer()])
    model.layers[0].register_forward_hook(lambda module, args, output: Opaque(output))
    model.forward = lambda x: model.layers[0](x).y
    x = torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="expected tensors in what a block returns, got Opaque"):
        quantize_(model, **TARGET, solver=AWQ(), calibration=x, progress=False)
    quantize_(model, **TARGET, solver=GPTQ(), calibration=x, progress=False)


@pytest.mark.parametrize("make", [outlier_model, linear_model])
def test_folds_leave_the_model_as_it_is(make):
    model = make()
    with torch.no_grad():
        exact = model(TOKENS).logits
        torch.manual_seed(0)
        for block in blocks(model, TOKENS):
            for fold in find_folds(block):
                readers = [block.linears[name] for name in fold.linears]
                scale = torch.rand(readers[0].in_features) + 0.5
                fold_scale(block.module.get_submodule(fold.before), readers, scale)
        torch.testing.assert_close(model(TOKENS).logits, exact, atol=2e-4, rtol=1e-4)


def test_ends_of_the_smoothing_scale():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 32, generator=generator), torch.randn(2, 16, 32, generator=generator)
    largest = x.abs().amax(0)
    only_weights = smoothing_scale(largest, list(w), 0.0)
    assert torch.equal(only_weights, smoothing_scale(9 * largest, list(w), 0.0))
    torch.testing.assert_close((w * only_weights).abs().amax((0, 1)), torch.ones(32))
    x = x / smoothing_scale(largest, list(w), 1.0)
    torch.testing.assert_close(x.abs().amax(0), torch.ones(32))
    largest[3] = 0
    assert smoothing_scale(largest, list(w), 0.5)[3] == 1


def test_the_sheets_table_of_one_outlier_channel():
    """Output errors at K = N = 256, groups of 128 and one channel 100 times the others'."""
    alphas, errors = (None, 0.0, 0.25, 0.5, 0.75, 1.0), torch.zeros(6)
    seeds = 6
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(512, 256, generator=generator)
        x[:, 7] *= 100
        w = torch.randn(256, 256, generator=generator) / 16
        for i, alpha in enumerate(alphas):
            scale = torch.ones(256)
            if alpha is not None:
                scale = smoothing_scale(x.abs().amax(0), [w], alpha)
            q = dequantize(round_to_nearest(w * scale, group_size=128, rule="minmax")) / scale
            errors[i] += (x @ (w - q).T).square().mean() / seeds
    plain, zero, *rest = errors.tolist()
    assert plain == pytest.approx(0.387, rel=0.15)
    assert zero > plain
    assert rest == pytest.approx([0.070, 0.053, 0.18, 0.38], rel=0.15)


class Outlier(nn.Module):
    """The sheet's layer behind a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256))])
        with torch.no_grad():
            self.layers[0][0].weight[7] = 100
            self.layers[0][1].weight.normal_(std=1 / 16)

    def forward(self, x):
        return self.layers[0](x)


SOLVERS = {
    "awq": AWQ(rule="minmax"),
    "smoothquant+": SmoothQuantPlus(alphas=(0.25, 0.5, 0.75), rule="minmax"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_an_outlier_channel_is_kept(name):
    x = torch.randn(4, 64, 256, generator=torch.Generator().manual_seed(0))
    errors = {}
    for solver in (RoundToNearest("minmax"), SOLVERS[name]):
        model = Outlier()
        exact = model(x)
        quantize_(model, group_size=128, solver=solver, calibration=x, progress=False)
        errors[solver] = float((model(x) - exact).square().mean().detach())
        assert type(model.layers[0][1]) is QuantizedLinear
    assert errors[SOLVERS[name]] < 0.4 * errors[RoundToNearest("minmax")]


@pytest.mark.parametrize("solver", [AWQ(), SmoothQuantPlus(alphas=(0.25, 0.5, 0.75))])
def test_a_model_with_outliers_loses_less_than_by_nearest_rounding(solver):
    model = outlier_model()
    with torch.no_grad():
        exact = model(TOKENS).logits
    size = sum(p.numel() for p in model.parameters())
    errors = []
    for s in (RoundToNearest(), solver):
        changed = copy.deepcopy(model)
        quantize_(changed, **TARGET, solver=s, calibration=TOKENS, progress=False)
        with torch.no_grad():
            errors.append(float((changed(TOKENS).logits - exact).square().mean()))
        kept = sum(p.numel() for p in changed.parameters())
        linears = [m for m in changed.modules() if type(m) is QuantizedLinear]
        assert kept + sum(m.in_features * m.out_features for m in linears) == size
    assert errors[1] < 0.8 * errors[0]


def test_awq_never_loses_to_nearest_rounding_in_its_own_measure():
    for make in (outlier_model, softmax_model):
        (block, _) = blocks(make().requires_grad_(False), TOKENS)
        exact = block.outputs()
        for fold in find_folds(block):
            solver, readers = AWQ(samples=3), [block.linears[n] for n in fold.linears]
            scale = solver.search(block, fold)
            one = torch.ones(readers[0].in_features)
            plain = solver._error(block, readers, one, exact)
            assert scale is None or solver._error(block, readers, scale, exact) < plain


def test_awq_without_clipping_or_scaling_is_nearest_rounding():
    """Flat weights and r = 0 give equal scales; the sheet's case of nothing to be gained."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16))])
    model.forward = lambda x: model.layers[0](x)
    weight = model.layers[0][1].weight
    weight.data = weight.data.sign()
    x = torch.randn(2, 5, 32)
    quantize_(model, **TARGET, solver=AWQ(steps=1, clips=1), calibration=x, progress=False)
    plain = round_to_nearest(weight, **TARGET)
    assert torch.equal(model.layers[0][1].packed, plain.packed)
    assert torch.equal(model.layers[0][0].weight.data, torch.ones(32))


def test_awq_scales_only_channels_that_are_used():
    """What the calibration does not reach may be used later; by 1e-4 its weights would be lost."""
    x, w = torch.tensor([4.0, 0, 1, 9]), torch.tensor([0.5, 0.5, 0, 0.5])
    torch.testing.assert_close(
        scaling_of(x, w, 0.5), torch.tensor([(2 / 3) ** 0.5, 1, 1, (3 / 2) ** 0.5])
    )
    assert torch.equal(scaling_of(0 * x, w, 0.5), torch.ones(4))


@pytest.mark.parametrize(
    ("name", "clipped"), [("block_sparse_moe.w1", True), ("attn.q_proj", False), ("key", False)]
)
def test_awq_clips_all_but_queries_and_keys(name, clipped):
    """One weight far out, on a channel that is hardly ever used."""
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 1e-3
    weights = []
    for clips in (1, 10):
        torch.manual_seed(0)
        linear = nn.Linear(32, 16)
        linear.weight.data[:, 5] = 2
        layer = linear
        for part in reversed(name.split(".")):
            layer = nn.Sequential(OrderedDict({part: layer}))
        model = nn.Sequential(nn.ModuleList([layer]))
        model.forward = layer.__call__
        solver = AWQ(clips=clips, rule="minmax")
        quantize_(model, **TARGET, solver=solver, calibration=x, progress=False)
        weights.append(dequantize(layer.get_submodule(name).weight))
    assert torch.equal(*weights) != clipped


def test_awq_clips_groups_that_gain_from_it():
    """One weight far out, on a channel that is hardly ever used."""
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    w[:, 5] = 6.0
    moments = torch.eye(32).repeat(2, 1, 1)
    moments[0, 5, 5] = 1e-3
    solver = AWQ(rule="minmax")
    clipped = solver._clipped(w, moments, TARGET)
    assert (clipped[:, 5] < 5).all()
    assert torch.equal(AWQ(clips=1)._clipped(w, moments, TARGET), w)


def test_smoothing_is_left_out_where_it_harms():
    model = softmax_model()
    worst = SmoothQuantPlus(alphas=(0.0, 1.0), samples=1, loss=lambda m, s: changes(m))

    def changes(model):
        norm = model.model.layers[0].input_layernorm.weight
        return torch.zeros(()) if bool((norm == 1).all()) else torch.ones(())

    quantize_(model, **TARGET, solver=worst, calibration=TOKENS, progress=False)
    plain = quantize_(softmax_model(), **TARGET)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())


class Logits(NamedTuple):
    logits: torch.Tensor


class Tagger(nn.Module):
    """Logits of a few classes, for every token or for all together."""

    def __init__(self, each):
        super().__init__()
        torch.manual_seed(0)
        self.each, self.embedding = each, nn.Embedding(SIZES["vocab_size"], 32)
        self.layers, self.head = nn.ModuleList([Layer(), Layer()]), nn.Linear(32, 3)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return Logits(self.head(x if self.each else x.mean(1)))


@pytest.mark.parametrize("each", [False, True])
def test_smoothing_of_a_classifier(each):
    """It has tokens and logits, but predicts no token."""
    model, solver = Tagger(each), SmoothQuantPlus(alphas=(0.25, 0.5))
    exact = model(TOKENS).logits.detach()
    quantize_(model, "int8", group_size=32, solver=solver, calibration=TOKENS, progress=False)
    assert (model(TOKENS).logits - exact).abs().max() < 0.02 * exact.abs().max()


def test_the_search_leaves_the_float_model_alone():
    model, before = outlier_model(), outlier_model()
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    layers = list(model.model.layers)
    with torch.no_grad():
        prepared = SmoothQuantPlus(alphas=(0.25, 0.5), samples=1).prepare(
            Walk(model, names, read_samples(TOKENS), TARGET)
        )
    assert float(prepared["alpha"]) in (0.25, 0.5) or prepared["alpha"].isnan()
    assert list(model.model.layers) == layers
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())


def test_resumes_with_the_loss_of_another_process(tmp_path):
    """The same function, at another address."""

    def run():
        def loss(model, sample):
            return sample.run(model).logits.square().mean()

        solver = SmoothQuantPlus(alphas=(0.25, 0.5), loss=loss)
        model = outlier_model()
        quantize_(
            model, **TARGET, solver=solver, calibration=TOKENS, checkpoint=tmp_path, progress=False
        )
        return solver, model.state_dict()

    (first, expected), (second, resumed) = run(), run()
    assert repr(first) != repr(second)
    assert all(torch.equal(v, expected[k]) for k, v in resumed.items())


@pytest.mark.parametrize("solver", [AWQ(steps=4), SmoothQuantPlus(alphas=(0.25, 0.5))])
def test_resumes_from_a_checkpoint(tmp_path, solver):
    def run(**options):
        return quantize_(
            outlier_model(), **TARGET, solver=solver, calibration=TOKENS, progress=False, **options
        ).state_dict()

    expected = run()
    run(checkpoint=tmp_path)
    (tmp_path / "model.layers.1.safetensors").unlink()
    resumed = run(checkpoint=tmp_path)
    assert all(torch.equal(v, expected[k]) for k, v in resumed.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AWQ(steps=0), "AWQ: expected steps >= 1, got 0"),
        (lambda: AWQ(clips=21), r"AWQ: expected clips in \[1, 20\], got 21"),
        (lambda: AWQ(samples=0), "AWQ: expected samples >= 1, got 0"),
        (lambda: AWQ(rule="best"), "AWQ: expected rule in"),
        (lambda: SmoothQuantPlus(alphas=()), r"SmoothQuantPlus: expected alphas in \[0, 1\]"),
        (lambda: SmoothQuantPlus(alphas=(2.0,)), r"SmoothQuantPlus: expected alphas in \[0, 1\]"),
        (lambda: SmoothQuantPlus(samples=0), "SmoothQuantPlus: expected samples >= 1, got 0"),
        (lambda: SmoothQuantPlus(rule="best"), "SmoothQuantPlus: expected rule in"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
