"""Adapters into weights and out of them again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastweights as fw
from fastweights.adapters import (
    LoRA,
    activate,
    adapter_layers,
    disabled,
    merge,
    merge_report,
    remove,
    unmerge,
)
from fastweights.adapters.base import matrix_of, row_tiles

from .models import VARIANTS, adapted, inputs, model, quantized, shake, two


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_merged_is_unmerged(options):
    ours, x = adapted(**options), inputs()
    shake(ours)
    expected = ours(x)
    merge(ours)
    assert not list(adapter_layers(ours))
    assert [type(m) for m in ours.modules()] == [type(m) for m in model().modules()]
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_merging_is_exact_to_one_rounding():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = adapted(model().to(dtype), targets=["up", "down"])
        shake(ours)
        layer = ours.layers[0].down
        exact = matrix_of(layer.base_layer).double() + layer.delta("default", torch.float64)
        merge(ours)
        half = (exact.to(dtype).double() - exact).abs().max()
        error = (matrix_of(ours.layers[0].down).double() - exact).abs().max()
        assert error <= half * 1.01


def test_a_base_that_is_kept_comes_back_bit_for_bit():
    ours, x = adapted(model().bfloat16(), modules_to_save=["head"]), inputs().bfloat16()
    shake(ours)
    before, y = {k: v.clone() for k, v in ours.state_dict().items()}, ours(x)
    merge(ours, keep_base=True)
    torch.testing.assert_close(ours(x), y, rtol=0.1, atol=0.1)
    assert not torch.equal(ours.layers[0].up.weight, before["layers.0.up.base_layer.weight"])
    with disabled(ours):
        assert torch.equal(ours(x), bare(x))
    for function in (
        lambda: activate(ours, "default"),
        lambda: remove(ours, "default"),
        lambda: merge(ours),
    ):
        with pytest.raises(ValueError, match="unmerged first"):
            function()
    copied = copy.deepcopy(ours)
    for merged in (ours, copied):
        unmerge(merged)
        after = merged.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert torch.equal(merged(x), y)
    with pytest.raises(ValueError, match="unmerge: expected adapters merged with keep_base=True"):
        unmerge(ours)


def bare(x):
    return model().bfloat16()(x)


def test_some_adapters_can_be_merged():
    ours, x = two(), inputs()
    activate(ours, "a")
    expected = ours(x)
    activate(ours, ["a", "b"])
    merge(ours, "a", keep_base=True)
    torch.testing.assert_close(ours(x), expected)
    unmerge(ours)
    merge(ours, ["a"])
    torch.testing.assert_close(ours(x), expected)
    with pytest.raises(ValueError, match="merge: expected a model with active adapters, got none"):
        merge(ours)


def test_a_merge_can_widen_the_model():
    ours, x = adapted(model().bfloat16()), inputs()
    shake(ours)
    exact = fw.adapt(model().bfloat16().float(), LoRA(rank=4, alpha=8))
    exact.load_state_dict(ours.state_dict())
    merge(ours, dtype=torch.float32)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(ours(x), exact(x))


def test_quantized_layers_are_merged_only_on_request():
    for format in ("int8", "int4"):
        ours, x = adapted(quantized(format)), inputs()
        shake(ours)
        expected, before = ours(x), ours.layers[0].up.base_layer.packed.clone()
        with pytest.raises(ValueError, match=f"merge: expected quantized=True to round {format}"):
            merge(ours)
        assert torch.equal(ours.layers[0].up.base_layer.packed, before)
        merge(ours, quantized=True, keep_base=True)
        assert ours.layers[0].up.base_layer.format == format
        error = (ours(x) - expected).norm() / expected.norm()
        assert error < {"int8": 0.02, "int4": 0.3}[format]
        assert torch.equal(unmerge(ours)(x), expected)


def test_columns_in_another_order_meet_the_adapter_as_they_come():
    order = torch.randperm(32)
    linear = nn.Linear(32, 16)
    packed = fw.quantize(linear.weight[:, order], "int8", group_size=32)
    base = fw.nn.QuantizedLinear(packed, linear.bias, order)
    ours = adapted(nn.Sequential(base))
    shake(ours)
    x = inputs()
    expected = base(x) + F.linear(x, ours[0].delta("default"))
    torch.testing.assert_close(ours(x), expected)
    tiles = torch.cat([tile for _, tile in row_tiles(base, torch.float32)])
    torch.testing.assert_close(F.linear(x, tiles, base.bias), base(x))
    merge(ours, quantized=True)
    torch.testing.assert_close(ours(x), expected, rtol=0.05, atol=0.05)


def test_broken_adapters_reach_no_weight():
    ours = adapted()
    with torch.no_grad():
        ours.head.lora_B["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="merge: expected finite adapters, got NaN or inf in"):
        merge(ours)
    assert torch.equal(ours.layers[0].up.base_layer.weight, model().layers[0].up.weight)


def test_merging_warns_where_weights_were_tied():
    base = nn.ModuleDict({"embed": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False)})
    base["head"].weight = base["embed"].weight
    before = base["embed"].weight.clone()
    ours = adapted(base, init="random")
    with pytest.warns(UserWarning, match="head no longer shares its weight with embed"):
        merge(ours)
    assert torch.equal(base["embed"].weight, before)
    assert not torch.equal(base["head"].weight, before)


@pytest.mark.parametrize(("size", "lost"), [(0.005, 0.31), (0.026, 0.064), (0.10, 0.016)])
def test_the_report_tells_what_bfloat16_loses(size, lost):
    """A weight of deviation 0.02, 512 x 512, and an update of rank 16 of a given size."""
    linear = nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(linear.weight, std=0.02)
    ours = fw.adapt(nn.Sequential(linear), LoRA(rank=16, init="random"))
    layer, before = ours[0], linear.weight.clone()
    layer.set_scale("default", size * before.float().norm().item() / layer.delta("default").norm())
    (loss,) = report = merge_report(ours)
    assert abs(loss.size - size) < 1e-4
    assert abs(loss.measured / lost - 1) < 0.08
    assert abs(loss.predicted / loss.measured - 1) < 0.1
    if size == 0.005:
        assert abs(loss.unmoved - 0.32) < 0.02
    cells = [cell.strip() for cell in str(report).splitlines()[2].split("|")]
    assert cells[1:3] == ["0", "bfloat16"]
    (wide,) = merge_report(ours, "default", dtype=torch.float32)
    assert wide.measured < 2e-4
    x, delta = torch.randn(64, 512), layer.delta("default")
    assert torch.equal(layer.weight, before)
    merge(ours)
    exact = F.linear(x, delta)
    output = F.linear(x, ours[0].weight.float() - before.float()) - exact
    assert abs(output.norm() / exact.norm() / lost - 1) < 0.15


def test_the_report_counts_codes_and_refuses_nothing():
    ours = adapted(quantized())
    shake(ours)
    report = merge_report(ours)
    assert {loss.path: loss.format for loss in report if "layers.1" in loss.path} == {
        "layers.1.q_proj": "int8",
        "layers.1.v_proj": "int8",
        "layers.1.up": "int8",
        "layers.1.down": "float32",
    }
    for loss in report:
        assert loss.measured < (1 if loss.format == "int8" else 1e-5)
        assert (loss.predicted != loss.predicted) == (loss.format == "int8")
    with pytest.raises(ValueError, match="merge_report: expected a model with LoRA to merge"):
        merge_report(model())
    with pytest.raises(ValueError, match="merge_report: expected names of adapters in"):
        merge_report(ours, "x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_a_small_update_on_average(dtype):
    """An update of a twentieth of a step is lost, or is there in one of twenty entries."""
    linear = nn.Linear(64, 64, bias=False, dtype=dtype)
    nn.init.constant_(linear.weight, 1.0)
    step = torch.finfo(dtype).eps
    for sign in (1, -1):
        for rounding, expected in (("nearest", 0.0), ("stochastic", sign * step / 20)):
            ours = fw.adapt(nn.Sequential(copy.deepcopy(linear)), LoRA(rank=1, alpha=sign))
            with torch.no_grad():
                ours[0].lora_A["default"].fill_(1.0)
                ours[0].lora_B["default"].fill_(step / 20)
            merge(ours, rounding=rounding)
            moved = ours[0].weight.double() - 1
            assert moved.unique().numel() == (1 if rounding == "nearest" else 2)
            assert abs(moved.mean() - expected) < step / 100
    with pytest.raises(ValueError, match=r"merge: expected rounding in .* got 'up'"):
        merge(adapted(), rounding="up")
