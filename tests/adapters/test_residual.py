"""PiSSA and CorDA: adapters that take their start out of the base."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn
from torch.utils.data import DataLoader

import fastweights as fw
from fastweights.adapters import (
    CorDA,
    LoRA,
    PiSSA,
    activate,
    adapter_configs,
    adapter_layers,
    adapter_names,
    combine,
    disabled,
    load_peft,
    merge,
    merge_report,
    per_sample,
    remove,
    save_peft,
    to_lora,
    unmerge,
)
from fastweights.adapters.corda import covariances, oriented_svd
from fastweights.adapters.pissa import weight_of
from fastweights.quantization.samples import read_samples

from .models import inputs, model, shake

METHODS = {
    "pissa": PiSSA(rank=4, alpha=3),
    "ipm": CorDA(rank=4, alpha=3),
    "kpm": CorDA(rank=4, alpha=3, mode="kpm"),
}


def wide():
    return model().double()


def given():
    return inputs(6, 9).double()


def adapted(method, base=None, name="default"):
    calibration = given() if isinstance(method, CorDA) else None
    return fw.adapt(base or wide(), method, name=name, calibration=calibration)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_start_and_what_is_left_make_up_the_weight(method):
    ours, x = adapted(method), given()
    for layer, linear in zip(adapter_layers(ours), bases(wide()), strict=True):
        rest = matrix(layer.base_layer)
        assert not torch.allclose(rest, linear)
        whole = rest + layer.delta("default", torch.float64)
        assert (whole - linear).abs().max() < 5e-16 * linear.abs().max() * 4
    torch.testing.assert_close(ours(x), wide()(x), rtol=1e-12, atol=1e-12)


def bases(bare):
    return [
        matrix(m) for m in bare.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)
    ]


def matrix(module):
    return module.weight.t() if type(module).__name__ == "Conv1D" else module.weight


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_other_uses_meet_the_model_as_it_was(method):
    x, expected = given(), wide()(given())
    ours = adapted(method)
    shake(ours)
    moved = ours(x)
    assert not torch.allclose(moved, expected)

    def is_whole(m=ours):
        torch.testing.assert_close(m(x), expected, rtol=1e-11, atol=1e-11)

    with disabled(ours):
        is_whole()
    activate(ours, ())
    is_whole()
    fw.adapt(ours, LoRA(rank=2), name="other")
    is_whole()
    other = copy.deepcopy(ours)
    is_whole(other)
    shake(other, "other")
    alone = fw.adapt(wide(), LoRA(rank=2), name="other")
    parameters = {k: v for k, v in other.state_dict().items() if k.endswith(".other")}
    alone.load_state_dict(parameters, strict=False)
    torch.testing.assert_close(other(x), alone(x), rtol=1e-11, atol=1e-11)
    merged = merge(copy.deepcopy(other))
    torch.testing.assert_close(merged(x), alone(x), rtol=1e-11, atol=1e-11)
    activate(ours, "default")
    torch.testing.assert_close(ours(x), moved)
    kept = merge(copy.deepcopy(ours), keep_base=True)
    torch.testing.assert_close(kept(x), moved, rtol=1e-11, atol=1e-11)
    with disabled(kept):
        is_whole(kept)
    torch.testing.assert_close(unmerge(kept)(x), moved)
    remove(ours, "default")
    assert adapter_names(ours) == ["other"]
    is_whole()
    remove(ours, "other")
    is_whole()


def test_two_starts_are_of_one_weight():
    ours, x = adapted(METHODS["pissa"], name="a"), given()
    adapted(METHODS["pissa"], ours, name="b")
    for layer in adapter_layers(ours):
        torch.testing.assert_close(
            layer.delta("a", torch.float64), layer.delta("b", torch.float64), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(
            weight_of(layer), matrix(layer.base_layer) + 2 * layer.delta("a", torch.float64),
            rtol=1e-9, atol=1e-9,
        )  # fmt: skip
    for names in ("a", "b", ["a", "b"], ()):
        activate(ours, names)
        torch.testing.assert_close(ours(x), wide()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_lora_of_twice_the_rank_is_the_trained_model(name, rslora):
    options = {"rank": 4, "alpha": 3, "rslora": rslora, "alpha_pattern": {"up": 2.0}}
    options |= {"rank_pattern": {"down": 3}}
    method = PiSSA(**options) if name == "pissa" else CorDA(mode=name, **options)
    ours, x = adapted(method), given()
    shake(ours)
    expected = ours(x)
    changes = [weight_change(layer) for layer in adapter_layers(ours)]
    to_lora(ours, "default")
    torch.testing.assert_close(ours(x), expected, rtol=1e-11, atol=1e-11)
    plain = fw.adapt(wide(), adapter_configs(ours)["default"])
    plain.load_state_dict(ours.state_dict())
    config = adapter_configs(plain)["default"]
    assert type(config) is LoRA
    assert config.rank == 8
    assert plain.layers[0].down.lora_A["default"].shape[0] == 6
    assert plain.head.scaling["default"] == ours.head.scaling["default"]
    plain.load_state_dict(wide_as_bases(), strict=False)  # the original base, not the restored one
    torch.testing.assert_close(plain(x), expected, rtol=1e-11, atol=1e-11)
    for layer, change in zip(adapter_layers(plain), changes, strict=True):
        torch.testing.assert_close(layer.delta("default", torch.float64), change)
    assert ours.head.lora_A["default"].requires_grad
    with pytest.raises(ValueError, match="to_lora: expected an adapter that changed the base"):
        to_lora(ours, "default")


def test_a_scale_that_was_changed_leaves_the_start_as_it_was(tmp_path):
    ours, x = adapted(PiSSA(rank=4)), given()
    shake(ours)
    for layer in adapter_layers(ours):
        layer.set_scale("default", 0.0)
    for refused in (to_lora, lambda m, n: save_peft(m, tmp_path, name=n)):
        with pytest.raises(ValueError, match="expected a scale of 'default' that is not 0"):
            refused(ours, "default")
    for layer in adapter_layers(ours):
        layer.set_scale("default", 0.5)
    expected = ours(x)
    save_peft(ours, tmp_path)
    torch.testing.assert_close(load_peft(wide(), tmp_path)(x), expected, rtol=1e-5, atol=1e-5)
    to_lora(ours, "default")
    torch.testing.assert_close(ours(x), expected, rtol=1e-11, atol=1e-11)


def weight_change(layer):
    a, b = layer._initial("default", torch.float64)
    return layer.delta("default", torch.float64) - b @ a


def wide_as_bases():
    state = {}
    for key, value in wide().state_dict().items():
        path, part = key.rsplit(".", 1)
        state[f"{path}.base_layer.{part}"] = value
    return state


@pytest.mark.parametrize("iterations", [None, 200])
def test_pissa_is_that_of_peft(iterations):
    kind = "pissa" if iterations is None else f"pissa_niter_{iterations}"
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["up", "down"], init_lora_weights=kind)
    theirs = LoraModel(model(), config, "default").model
    method = PiSSA(rank=4, alpha=3, targets=["up", "down"], iterations=iterations)
    ours = fw.adapt(model(), method)
    check_against(ours, theirs, 1e-4 if iterations is None else 0.05)


def check_against(ours, theirs, tolerance):
    for layer in adapter_layers(ours):
        path = next(name for name, m in ours.named_modules() if m is layer)
        other = theirs.get_submodule(path)
        expected, rest = other.get_delta_weight("default"), other.base_layer.weight
        if type(other.base_layer).__name__ == "Conv1D":
            expected, rest = expected.t(), rest.t()
        size = expected.norm()
        assert (layer.delta("default") - expected).norm() < tolerance * size
        assert (matrix(layer.base_layer) - rest).norm() < tolerance * size


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_that_of_peft(mode):
    """At batch size 1, on inputs whose largest entry is their absolute maximum."""
    samples = [x.unsqueeze(0) for x in inputs(8, 40).sign() * inputs(8, 40)]
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(
        r=4, lora_alpha=3, target_modules=targets, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )  # fmt: skip
    theirs = model(depth=1).eval()

    def run():
        for x in samples:
            theirs(x)

    preprocess_corda(theirs, config, run_model=run)
    theirs = LoraModel(theirs, config, "default").model
    method = CorDA(rank=4, alpha=3, targets=targets, mode=mode)
    ours = fw.adapt(model(depth=1), method, calibration=samples)
    check_against(ours, theirs, 1e-3)


def test_the_decomposition_is_exact():
    torch.manual_seed(0)
    w, x = torch.randn(10, 12).double(), anisotropic(200)
    for shape in (w, w.t()[:, :10], w[:5]):
        c = x[:, : shape.shape[1]].t() @ x[:, : shape.shape[1]]
        u, s, p = oriented_svd(shape, c)
        assert (u * s @ p - shape).abs().max() < 1e-12
        assert (s[:-1] >= s[1:]).all()


def anisotropic(rows, columns=12):
    torch.manual_seed(1)
    turn = torch.linalg.qr(torch.randn(columns, columns).double())[0]
    return torch.randn(rows, columns).double() * 0.5 ** torch.arange(columns) @ turn


def test_with_white_inputs_corda_is_pissa():
    torch.manual_seed(0)
    linear = nn.Linear(12, 10).double()
    w = linear.weight.detach()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    for scale in (1.0, 7.0):
        uc, sc, p = oriented_svd(w, scale * torch.eye(12))
        torch.testing.assert_close((uc[:, :4] * sc[:4]) @ p[:4], (u[:, :4] * s[:4]) @ vh[:4])


def test_the_scale_of_the_inputs_is_of_no_consequence():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10)).double()
    x = anisotropic(100)
    for normalize in ("absmax", "none"):
        deltas = []
        for scale in (1.0, 1e-6, 1e6):
            method = CorDA(rank=4, normalize=normalize)
            ours = fw.adapt(copy.deepcopy(base), method, calibration=[x * scale])
            deltas.append(ours[0].delta("default", torch.float64))
        torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(deltas[0], deltas[2], rtol=1e-6, atol=1e-8)


def test_what_kpm_trains_matters_little_to_the_inputs():
    """Without r = 4 of 12 components: 14 % against 89 % in the sheet's random test."""
    torch.manual_seed(0)
    base, x = nn.Linear(12, 12, bias=False).double(), anisotropic(400)
    changes = {}
    for mode in ("ipm", "kpm"):
        ours = fw.adapt(
            nn.Sequential(copy.deepcopy(base)), CorDA(rank=4, mode=mode), calibration=[x]
        )
        without = x @ ours[0].base_layer.weight.t()
        changes[mode] = float((without - base(x)).norm() / base(x).norm())
    assert changes["kpm"] < 0.2
    assert changes["ipm"] > 0.8


def test_batches_and_memory_change_nothing():
    x = inputs(8, 5)
    results = []
    for calibration, memory in (
        (x, 1 << 30),
        (x, 0),
        ([x], 1 << 30),
        (DataLoader(x, batch_size=3), 20_000),
    ):
        ours = fw.adapt(model(), CorDA(rank=3, memory=memory), calibration=calibration)
        results.append([layer.delta("default") for layer in adapter_layers(ours)])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=2e-3, atol=2e-4)


def test_memory_bounds_the_covariances_of_one_pass():
    """One of 32 x 32 float32 numbers takes 4 KiB, and one of 64 x 64 takes 16."""
    x, sizes = inputs(3, 5), [4096] * 3 + [16384] + [4096] * 3 + [16384] + [4096]
    for memory, passes in ((0, 9), (3 * 4096, 5), (sum(sizes) - 1, 2), (sum(sizes), 1)):
        bare, seen = model(), []
        bare.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        fw.adapt(bare, CorDA(rank=3, memory=memory), calibration=x)
        assert len(seen) == 3 * passes


def test_covariances_are_means_over_samples():
    x = inputs(4, 6)
    bare = model().train()
    samples = read_samples([x[:3], x[3:]])
    found = covariances(bare, ["layers.0.q_proj", "layers.0.v_proj"], samples, normalize="none")
    flat = x.flatten(0, 1)
    torch.testing.assert_close(found["layers.0.q_proj"], flat.t() @ flat / 4)
    assert torch.equal(found["layers.0.q_proj"], found["layers.0.v_proj"])
    assert bare.head.training
    found = covariances(bare, ["layers.0.q_proj"], read_samples(-x), normalize="absmax")
    scaled = (x / x.abs().amax((1, 2), keepdim=True)).flatten(0, 1)
    torch.testing.assert_close(found["layers.0.q_proj"], scaled.t() @ scaled / 4)


def test_a_singular_covariance_is_damped():
    torch.manual_seed(0)
    x = torch.randn(3, 12).double()
    w = torch.randn(10, 12).double()
    u, s, p = oriented_svd(w, x.t() @ x)
    assert (u * s @ p - w).abs().max() < 1e-11
    with pytest.raises(ValueError, match="CorDA: expected a covariance that damping makes inve"):
        oriented_svd(w, -torch.eye(12))


def test_trained_parts_are_the_adapters():
    ours = adapted(METHODS["pissa"])
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in ours.named_parameters() if ".lora_" in n}
    ours(given()).sum().backward()
    assert all(p.grad is not None for n, p in ours.named_parameters() if n in trained)


def test_state_dicts_bring_the_rest_along():
    ours, x = adapted(METHODS["kpm"]), given()
    shake(ours)
    torch.manual_seed(9)
    other = fw.adapt(model(depth=2).double(), CorDA(rank=4, alpha=3), calibration=given() * 2)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(x), ours(x))
    with disabled(ours), disabled(other):
        assert torch.equal(other(x), ours(x))
    to_lora(other, "default")
    torch.testing.assert_close(other(x), ours(x), rtol=1e-10, atol=1e-10)


def test_the_base_can_be_quantized_afterwards():
    ours, x = fw.adapt(model(), PiSSA(rank=8, targets=["up"])), inputs()
    shake(ours, by=0.01)
    expected = ours(x)
    fw.quantize_(ours, "int4", group_size=32, skip=("head",))
    assert ours.layers[0].up.base_layer.format == "int4"
    assert (ours(x) - expected).norm() / expected.norm() < 0.2
    with disabled(ours):
        assert torch.isfinite(ours(x)).all()
    with pytest.raises(TypeError, match="expected a float layer to take the start of an"):
        to_lora(ours, "default")
    assert ours.layers[1].up.lora_A["default"].shape == (8, 32)


def test_compiled_modules_compute_the_same():
    ours, x = adapted(METHODS["pissa"]), given()
    shake(ours)
    activate(ours, ())
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))


def test_reports_are_about_what_was_trained():
    ours = fw.adapt(model(), PiSSA(rank=4))
    shake(ours, by=1e-3)
    for loss, layer in zip(merge_report(ours), adapter_layers(ours), strict=True):
        change = weight_change(layer)
        assert abs(loss.size * weight_of(layer).norm() / change.norm() - 1) < 1e-3


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="adapt: expected calibration with CorDA, got None"):
        fw.adapt(model(), CorDA())
    with pytest.raises(ValueError, match="PiSSA: expected rank <= 5 for a layer of 32 inputs and"):
        fw.adapt(model(), PiSSA(rank=6))
    with pytest.raises(TypeError, match="LoRA: expected a float layer to take the start"):
        fw.adapt(fw.quantize_(model(), group_size=32, skip=()), PiSSA(rank=4, targets=["up"]))
    with pytest.raises(TypeError, match="PiSSA: expected linear layers, got Embedding"):
        fw.adapt(nn.Sequential(nn.Embedding(8, 8)), PiSSA(rank=4, targets=["0"]))
    with pytest.raises(ValueError, match=r"CorDA: expected mode in .* got 'x'"):
        CorDA(mode="x")
    with pytest.raises(ValueError, match=r"CorDA: expected normalize in .* got 'max'"):
        CorDA(normalize="max")
    with pytest.raises(ValueError, match="PiSSA: expected iterations >= 0, got -1"):
        PiSSA(iterations=-1)
    with pytest.raises(ValueError, match=r"CorDA: expected finite inputs of layers\.0\.q_proj, n"):
        fw.adapt(model(), CorDA(targets=["q_proj"]), calibration=inputs() * 0)
    bare = model()
    bare.spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="CorDA: expected calibration to reach spare, which"):
        fw.adapt(bare, CorDA(rank=4), calibration=inputs())
    assert not list(adapter_layers(bare))
    with pytest.raises(ValueError, match=r"adapt: expected calibration of shape \[samples"):
        fw.adapt(bare, CorDA(rank=4), calibration=torch.ones(3))
    ours = adapted(METHODS["pissa"]).eval()
    with pytest.raises(ValueError, match="per_sample: expected adapters that leave the base"):
        per_sample(ours, ["default"]).__enter__()
    with pytest.raises(ValueError, match="combine: expected adapters that leave the base"):
        combine(ours, {"default": 1.0}, name="x")
    with pytest.raises(ValueError, match="expected no DoRA beside 'default', which changes the"):
        fw.adapt(ours, LoRA(rank=4, dora=True), name="x")
    assert adapter_names(ours) == ["default"]
    turned = fw.adapt(model(), LoRA(rank=4, dora=True))
    with pytest.raises(ValueError, match="expected no DoRA beside 'x', which changes the base"):
        fw.adapt(turned, PiSSA(rank=4), name="x")
