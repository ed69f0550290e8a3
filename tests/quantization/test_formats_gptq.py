"""GPTQ checkpoints, against the layout's definition written out as loops."""

import pytest
import torch

import fastweights as fw
from checkpoint_layers import bit_stream, check_values, int32, same
from checkpoint_layers import gptq as checkpoint
from fastweights.ops.quantization.layout import unpack
from fastweights.quantization.formats import GPTQ, Layer

BITS = [2, 3, 4, 8]


def definition(tensors, bits, version):
    """W[n, k] = scales[g, n] * (code[k, n] - zero[g, n]), g = g_idx[k], in float64."""
    scales, g_idx = tensors["scales"].double(), tensors["g_idx"].tolist()
    codes = [bit_stream(column, bits) for column in tensors["qweight"].T]
    zeros = [bit_stream(row, bits) for row in tensors["qzeros"]]
    if version == 1:
        zeros = [[(z + 1) % 2**bits for z in row] for row in zeros]
    return torch.stack([
        torch.stack([scales[g, n] * (row[k] - zeros[g][n]) for k, g in enumerate(g_idx)])
        for n, row in enumerate(codes)
    ])  # fmt: skip


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
def test_against_the_definition(bits, version, act_order):
    tensors = checkpoint(bits=bits, act_order=act_order)
    form = GPTQ(bits, 32, version)
    layer = form.read(tensors)
    expected = definition(tensors, bits, version)
    step = tensors["scales"].double()[tensors["g_idx"].long()].T
    check_values(layer, expected, step, bits)
    same(form.write(layer), tensors)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_files_are_exact(bits):
    tensors = checkpoint(bits=bits)
    words = {
        2: [0xAAAAAAAA],
        3: [0x24924924, 0x49249249, 0x92492492],
        4: [0x88888888],
        8: [0x80808080],
    }[bits]
    assert set(bit_stream(words, bits)) == {1 << (bits - 1)}
    tensors["qzeros"] = int32(*words).repeat(4, 2 * bits // len(words))
    layer = GPTQ(bits, 32, 2).read(tensors)
    assert torch.equal(layer.dequantize(torch.float64), definition(tensors, bits, 2))


def test_the_sheets_words():
    tensors = checkpoint(32, 32)
    tensors["qweight"] = int32(0x76543210, 0, 0, 0)[:, None].repeat(1, 32)
    codes = GPTQ(4, 32, 2).read(tensors)
    assert unpack(codes.weight)[0][0, 0, :8].tolist() == list(range(8))
    tensors = checkpoint(32, 32, bits=3)
    tensors["qweight"] = int32(0x88FAC688, 0xC688FAC6, 0xFAC688FA)[:, None].repeat(1, 32)
    codes = GPTQ(3, 32, 2).read(tensors)
    assert unpack(codes.weight)[0][0, 0].tolist() == [i % 8 for i in range(32)]


def test_versions_store_the_same_layer():
    tensors = checkpoint()
    tensors["qzeros"][:] = torch.tensor(0x77777777, dtype=torch.int32)  # symmetric in version 1
    layer = GPTQ(4, 32, 1).read(tensors)
    second = GPTQ(4, 32, 2).write(layer)
    assert set(second["qzeros"].flatten().tolist()) == {0x88888888 - 2**32}
    # A field of 15 is a zero point of 0, whatever its neighbours.
    tensors["qzeros"][:] = torch.tensor(0x7FFF7777, dtype=torch.int32)
    second = GPTQ(4, 32, 2).write(GPTQ(4, 32, 1).read(tensors))
    assert set(second["qzeros"].flatten().tolist()) == {0x80008888 - 2**32}
    same(GPTQ(4, 32, 1).write(GPTQ(4, 32, 2).read(second)), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_dtype_come_back(dtype):
    tensors = checkpoint(dtype=dtype)
    layer = GPTQ(4, 32).read(tensors)
    assert layer.weight.format == ("int4_zp32" if dtype == torch.float32 else "int4_zp")
    same(GPTQ(4, 32).write(layer), tensors)


def test_one_scale_for_all_inputs():
    tensors = checkpoint(k=96, group=96)
    tensors.pop("g_idx")
    form = GPTQ(4, -1, g_idx=False)
    layer = form.read(tensors)
    assert layer.weight.group_size == 96
    same(form.write(layer), tensors)


def test_the_last_group_may_be_smaller():
    tensors = checkpoint(k=96, group=64)
    layer = GPTQ(4, 64).read(tensors)
    assert layer.weight.shape == (64, 96)
    same(GPTQ(4, 64).write(layer), tensors)


def test_groups_of_scale_zero():
    tensors = checkpoint()
    tensors["scales"][1] = 0
    layer = GPTQ(4, 32).read(tensors)
    assert not layer.dequantize()[:, 32:64].any()
    same(GPTQ(4, 32).write(layer), tensors)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("activation", ["float", "int8"])
def test_the_module_computes_with_the_weight(act_order, activation):
    layer = GPTQ(4, 32).read(checkpoint(act_order=act_order), activation=activation)
    module = layer.module()
    x = torch.randn(3, 128, requires_grad=True)
    expected = torch.nn.functional.linear(x, layer.dequantize(), layer.bias.float())
    tolerance = 1e-5 if activation == "float" else 2e-2
    assert (module(x) - expected).norm() <= tolerance * expected.norm()
    (got,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(got, layer.dequantize().sum(0).expand(3, 128))
    other = GPTQ(4, 32).read(checkpoint(act_order=act_order, seed=1), activation=activation)
    other = other.module()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_what_we_quantize_is_written_where_it_fits():
    symmetric = GPTQ(4, 32).read(checkpoint(bias=False)).weight
    assert GPTQ(4, 32).write(Layer(symmetric)).keys() == {"qweight", "qzeros", "scales", "g_idx"}
    w = torch.randn(32, 64)
    for format in ("int4_zp", "int4_sym", "int8_zp", "int8_sym"):
        weight = fw.quantize(w, format, group_size=32)
        form = GPTQ(int(format[3]), 32)
        again = form.read(form.write(Layer(weight)))
        assert torch.equal(again.dequantize(), fw.dequantize(weight))
    with pytest.raises(ValueError, match=r"gptq: expected a weight with zero points .* got int4"):
        GPTQ(4, 32).write(Layer(fw.quantize(w, "int4", group_size=32)))
    with pytest.raises(ValueError, match=r"gptq: expected scales that torch.float16 holds"):
        GPTQ(4, 32).write(Layer(fw.quantize(w, "int4_zp32", group_size=32)))
    with pytest.raises(ValueError, match="gptq: expected group_size 64, got 32"):
        GPTQ(4, 64).write(Layer(symmetric))
    with pytest.raises(ValueError, match="gptq: expected integer zero points from 0 to 7"):
        GPTQ(3, 32).write(Layer(symmetric))
    with pytest.raises(ValueError, match="gptq: expected integer zero points from 0 to 15"):
        GPTQ(4, 32).write(Layer(fw.quantize(w, "int8_zp", group_size=32)))
    three = GPTQ(3, 32).read(checkpoint(bits=3))
    four = GPTQ(4, 32).read(GPTQ(4, 32).write(three))
    assert (four.weight.format, three.weight.format) == ("int4_zp", "int3_zp")
    assert torch.equal(four.dequantize(), three.dequantize())


NAN = {"scales": torch.full((4, 64), torch.nan).half()}
BAD = [
    (
        {"qweight": None},
        r"gptq: layer\.qweight: expected \[in_features .*, N\], got none",
    ),
    (
        {"qweight": torch.zeros(16, 64)},
        r"layer\.qweight: expected int32 .* got float32 \[16, 64\]",
    ),
    ({"qweight": torch.zeros(3, 64).int()}, r"qweight: expected multiples of 32 as in_features"),
    ({"qweight": torch.zeros(16, 0).int()}, r"qweight: expected int32 .* got int32 \[16, 0\]"),
    ({"qzeros": torch.zeros(3, 8).int()}, r"qzeros: expected .* = \[4, 8\], got int32 \[3, 8\]"),
    ({"scales": torch.zeros(4, 64).int()}, r"scales: expected float16 or bfloat16 or float32"),
    (NAN, r"layer\.scales: expected finite values, got an infinite or NaN one"),
    ({"scales": torch.full((4, 64), 3e38)}, r"expected scale \* \(code - zero\) to be finite"),
    ({"g_idx": torch.full((128,), 4).int()}, r"g_idx: expected groups from 0 to 3, got 4 to 4"),
    ({"g_idx": torch.full((128,), -1).int()}, r"g_idx: expected groups from 0 to 3, got -1 to -1"),
    ({"g_idx": torch.zeros(128).int()}, r"expected 32 inputs in every group, got 128 in group 0"),
    ({"g_idx": torch.zeros(127).int()}, r"g_idx: expected int32 \[in_features\] = \[128\]"),
    ({"bias": torch.zeros(63).half()}, r"bias: expected .* \[N\] = \[64\], got float16 \[63\]"),
    ({"perm": torch.zeros(1)}, r"layer\.perm: expected no tensor of this name"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_tensors(change, message):
    tensors = {k: v for k, v in (checkpoint() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        GPTQ(4, 32).read(tensors, "layer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "gptq: bits: expected 2, 3, 4 or 8, got 5"),
        ({"bits": "4"}, "gptq: bits: expected an integer, got '4'"),
        ({"bits": True}, "gptq: bits: expected an integer, got True"),
        ({"group_size": 48}, "gptq: group_size: expected -1, a multiple of 32, or"),
        ({"group_size": 1 << 40}, "gptq: group_size: expected"),
        ({"group_size": 0}, "gptq: group_size: expected"),
        ({"checkpoint_format": "gptq_p"}, "gptq: checkpoint_format: expected one of"),
        ({"checkpoint_format": "marlin"}, "gptq: checkpoint_format: expected one of"),
        ({"dynamic": {"-:.*": {}}}, "gptq: dynamic: expected one setting"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        GPTQ.from_config({"bits": 4, "group_size": 128} | change)


def test_configs():
    assert GPTQ.from_config({"bits": 4, "group_size": -1}) == GPTQ(4, -1, 1)
    config = {"bits": 3, "group_size": 128, "checkpoint_format": "gptq_v2", "desc_act": True}
    assert GPTQ.from_config(config) == GPTQ(3, 128, 2)
