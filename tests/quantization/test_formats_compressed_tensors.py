"""Checkpoints of compressed-tensors, against the layout's definition written out as loops."""

import pytest
import torch
from safetensors.torch import load, save

from checkpoint_layers import bit_stream, check_values, gptq, int32, same
from checkpoint_layers import compressed_tensors as checkpoint
from fastweights.quantization.formats import GPTQ, CompressedTensors

BITS = [1, 2, 3, 4, 5, 6, 7, 8]


def codes_of(words, bits, count, dense):
    if dense:
        return bit_stream(words, bits)[:count]
    return [c for word in words for c in bit_stream([word], bits)][:count]


def definition(tensors, bits, dense, group):
    """W[n, k] = weight_scale[n, g] * (code[n, k] - zero[n, g]), g = weight_g_idx[k], in float64."""
    n, k = tensors["weight_shape"].tolist()
    groups = tensors.get("weight_g_idx", torch.arange(k) // group).long()
    codes = [codes_of(row, bits, k, dense) for row in tensors["weight_packed"]]
    zeros = torch.full(tensors["weight_scale"].shape, 2 ** (bits - 1))
    if "weight_zero_point" in tensors:
        columns = tensors["weight_zero_point"].T
        zeros = torch.tensor([codes_of(column, bits, n, dense) for column in columns]).T
    scale = tensors["weight_scale"].double()[:, groups]
    return scale * (torch.tensor(codes) - zeros[:, groups]), scale


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_against_the_definition(bits, dense, symmetric):
    tensors = checkpoint(bits=bits, dense=dense, symmetric=symmetric)
    form = CompressedTensors(bits, 32, symmetric, dense)
    layer = form.read(tensors)
    check_values(layer, *definition(tensors, bits, dense, 32), bits)
    same(form.write(layer), tensors)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 70), (3, 1), (8, 64)])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("dense", [True, False])
def test_rows_of_one_word(n, k, bits, dense):
    """As a file has them: the strides of ours are those of the transpose that they come from."""
    tensors = load(save(checkpoint(n, k, bits, dense=dense, symmetric=False)))
    form = CompressedTensors(bits, 32, False, dense)
    layer = form.read(tensors)
    check_values(layer, *definition(tensors, bits, dense, 32), bits)
    same(form.write(layer), tensors)


@pytest.mark.parametrize("dense", [True, False])
def test_the_sizes_tell_the_packings_apart(dense):
    tensors = checkpoint(n=192, k=192, bits=3, dense=dense, symmetric=False)
    layers = [CompressedTensors(3, 32, False, guess).read(tensors) for guess in (True, False)]
    assert torch.equal(layers[0].weight.packed, layers[1].weight.packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [64, 128])
def test_groups_and_scales(dtype, group):
    tensors = checkpoint(group=group, dtype=dtype)
    form = CompressedTensors(4, -1 if group > 100 else group)
    layer = form.read(tensors)
    assert layer.weight.format == ("int4_zp32" if dtype == torch.float32 else "int4_zp")
    same(form.write(layer), tensors)


def test_act_order():
    tensors = checkpoint(act_order=True, symmetric=False)
    form = CompressedTensors(4, 32, False)
    layer = form.read(tensors)
    check_values(layer, *definition(tensors, 4, True, 32), 4)
    same(form.write(layer), tensors)
    plain = checkpoint()
    none = plain | {"weight_g_idx": torch.full((100,), -1, dtype=torch.int32)}
    assert CompressedTensors(4, 32).read(none).order is None
    regular = plain | {"weight_g_idx": (torch.arange(100) // 32).int()}
    form = CompressedTensors(4, 32, g_idx=True)
    same(form.write(form.read(regular)), regular)


def test_from_gptq():
    """Act-order and all: the same weight in another checkpoint."""
    layer = GPTQ(4, 32).read(gptq(act_order=True))
    form = CompressedTensors(4, 32, symmetric=False)
    again = form.read(form.write(layer))
    assert torch.equal(again.dequantize(), layer.dequantize())
    with pytest.raises(ValueError, match="compressed-tensors: expected a symmetric weight"):
        CompressedTensors(4, 32).write(layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": None}, r"layer\.weight_packed: expected \[N, words\], got none"),
        ({"weight_shape": torch.tensor([48, 2**40])}, r"weight_shape: expected \[48, inputs\] of"),
        ({"weight_shape": torch.tensor([48, -1])}, r"weight_shape: expected \[48, inputs\] of"),
        ({"weight_shape": torch.tensor([47, 100])}, r"weight_shape: .* got \[47, 100\]"),
        ({"weight_shape": torch.tensor([48, 120])}, r"weight_shape: expected \[48, inputs\] of"),
        ({"weight_shape": torch.tensor([48.0, 100])}, r"weight_shape: expected int64 \[2\]"),
        ({"weight_scale": torch.zeros(48, 3)}, r"weight_scale: expected .* = \[48, 4\]"),
        ({"weight_scale": torch.full((48, 4), torch.nan)}, r"weight_scale: expected finite values"),
        ({"weight_zero_point": int32(0)}, r"weight_zero_point: expected no tensor of this name"),
        ({"weight_g_idx": torch.full((100,), 4).int()}, r"weight_g_idx: expected groups from 0"),
        ({"input_scale": torch.ones(1)}, r"layer\.input_scale: expected no tensor of this name"),
    ],
)
def test_bad_tensors(change, message):
    tensors = {k: v for k, v in (checkpoint() | change).items() if v is not None}
    with pytest.raises(ValueError, match="compressed-tensors: .*" + message):
        CompressedTensors(4, 32).read(tensors, "layer")


def test_asymmetric_files_have_zero_points():
    with pytest.raises(ValueError, match=r"weight_zero_point: expected .*, got none"):
        CompressedTensors(4, 32, symmetric=False).read(checkpoint())


def config(group=None, weights=None, **changes):
    w = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    one = {"targets": ["Linear"], "weights": w | (weights or {})} | (group or {})
    return {"format": "pack-quantized", "config_groups": {"group_0": one}} | changes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (config(weights={"type": "float"}), "type: expected one of"),
        (config(weights={"strategy": "tensor"}), "strategy: expected one of"),
        (config(weights={"strategy": ["group"]}), "strategy: expected one of"),
        (config(weights={"symmetric": 1}), "symmetric: expected one of"),
        (config(weights={"num_bits": 9}), "num_bits: expected 1 to 8, got 9"),
        (config(weights={"group_size": 8}), "group_size: expected -1, a multiple of 32, or"),
        (config({"input_activations": {"num_bits": 8}}), "input_activations: expected none"),
        (config({"weights": None}), "weights: expected settings, got None"),
        (config({"format": "nvfp4-pack-quantized"}), "format: expected pack-quantized"),
        (config(format="int-quantized"), "format: expected pack-quantized, got 'int-quantized'"),
        (config(config_groups={}), "config_groups: expected at least one"),
        (config(config_groups=[1]), "config_groups: expected at least one"),
        (config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: expected none"),
    ],
)
def test_bad_configs(changed, message):
    with pytest.raises(ValueError, match="compressed-tensors: " + message):
        CompressedTensors.from_config(changed)


def test_configs():
    read = CompressedTensors.from_config
    assert read(config()) == CompressedTensors(4, 128)
    assert read(config(version="0.17.1")) == CompressedTensors(4, 128, dense=False)
    assert read(config(version="0.18.0")) == CompressedTensors(4, 128)
    per_channel = {"strategy": "channel", "group_size": None, "symmetric": False, "num_bits": 8}
    assert read(config(weights=per_channel)) == CompressedTensors(8, -1, False)
    two = config()["config_groups"]["group_0"], config(weights={"num_bits": 8})
    groups = {"a": two[0], "b": two[1]["config_groups"]["group_0"]}
    with pytest.raises(ValueError, match="config_groups: expected one setting for all layers"):
        read(config(config_groups=groups))
