"""4-bit checkpoints of bitsandbytes."""

import json

import pytest
import torch

import fastweights as fw
from checkpoint_layers import LargestFloat, bits_and_bytes, gptq, same
from fastweights.quantization.formats import GPTQ, BitsAndBytes4Bit, Layer

STATE = "weight.quant_state.bitsandbytes__nf4"


def definition(tensors, kind="nf4"):
    """Float32, one block after the other."""
    state = json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{kind}"].tolist()))
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" in tensors:
        levels = tensors["weight.nested_quant_map"][absmax.long()]
        scale = tensors["weight.nested_absmax"][torch.arange(len(absmax)) // 256]
        absmax = levels * scale + state["nested_offset"]
    stored = tensors["weight"].view(torch.uint8).flatten()
    codes = torch.stack([stored >> 4, stored & 15], 1).flatten().long()
    block = torch.arange(len(codes)) // state["blocksize"]
    return (tensors["weight.quant_map"][codes] * absmax[block]).view(state["shape"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("block", "k"), [(64, 128), (64, 96), (32, 64), (256, 320)])
def test_against_the_definition(kind, nested, block, k):
    tensors = bits_and_bytes(24, k, kind, block, nested=nested)
    form = BitsAndBytes4Bit(kind)
    layer = form.read(tensors)
    assert torch.equal(layer.dequantize(), definition(tensors, kind))
    same(form.write(layer), tensors)


def test_the_sheets_bytes():
    x = torch.tensor([0.5, -1, 0.25, 0.1, -0.3, 0, 0.9, -0.05]).repeat(8)[None]
    tensors = BitsAndBytes4Bit().write(Layer(fw.quantize(x, "nf4")))
    assert bytes(tensors["weight"].flatten().tolist()) == bytes.fromhex("c0a847f6") * 8
    assert tensors["weight.absmax"].tolist() == [1]


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_stored_as_another_dtype(storage):
    tensors = bits_and_bytes(storage=storage, nested=True) | {"bias": torch.randn(48)}
    form = BitsAndBytes4Bit(storage=storage)
    layer = form.read(tensors)
    assert torch.equal(layer.dequantize(), definition(tensors))
    same(form.write(layer), tensors)


def test_what_we_quantize_is_written_where_it_fits():
    w = torch.randn(16, 128)
    for block in (64, 128):
        weight = fw.quantize(w, "nf4", group_size=64)
        if block == 128:
            weight = fw.quantize(w, "nf4", group_size=128)
        form = BitsAndBytes4Bit(block_size=block)
        assert torch.equal(form.read(form.write(Layer(weight))).weight.packed, weight.packed)
    with pytest.raises(ValueError, match="bitsandbytes: expected one scale in every 128 weights"):
        BitsAndBytes4Bit(block_size=128).write(Layer(fw.quantize(w, "nf4")))
    for weight in (GPTQ(4, 32).read(gptq()).weight, fw.quantize(w[:, :90], "nf4")):
        with pytest.raises(ValueError, match="bitsandbytes: expected a weight in nf4, its inputs"):
            BitsAndBytes4Bit().write(Layer(weight))
    layer = BitsAndBytes4Bit().read(bits_and_bytes(16, 128, nested=True))
    other = Layer(fw.quantize(w, "nf4"), kept=layer.kept)
    assert "weight.nested_absmax" not in BitsAndBytes4Bit().write(other)


def test_what_is_kept_of_another_weight():
    """Its blocks are no longer those of the weight: another shape, or as many of another type."""
    ones = torch.ones(16, 128)
    kept = BitsAndBytes4Bit().read(BitsAndBytes4Bit().write(Layer(fw.quantize(ones, "nf4")))).kept
    for form, w in (("nf4", ones.repeat(2, 1)), ("nf4", ones.view(8, 256)), ("fp4", ones)):
        layer = Layer(fw.quantize(w, form, group_size=64), kept=kept)
        again = BitsAndBytes4Bit(form).read(BitsAndBytes4Bit(form).write(layer))
        assert torch.equal(again.dequantize(), w)


def test_writing_makes_no_float_copy():
    layer = BitsAndBytes4Bit().read(bits_and_bytes(64, 128))
    for each in (layer, Layer(layer.weight)):
        with LargestFloat() as watch:
            BitsAndBytes4Bit().write(each)
        assert 0 < watch.elements <= 64 * 128 // 32


def state(**changes):
    value = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [48, 96]} | changes
    return {STATE: torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)}


NESTED = {"nested_blocksize": 256, "nested_offset": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({STATE: None}, r"__nf4: expected \[bytes of JSON\], got none"),
        ({STATE: torch.tensor([255, 0]).byte()}, "__nf4: expected JSON, got something else"),
        (state(quant_type="fp4"), "__nf4: expected an object with quant_type 'nf4'"),
        (state(shape=[48]), r"expected shape to be \[N, in_features\], got \[48\]"),
        (state(shape=[48, True]), r"expected shape to be \[N, in_features\], got \[48, True\]"),
        (state(shape=[2**31, 2]), r"expected shape to be \[N, in_features\]"),
        (state(shape=[24, 96]), r"weight: expected uint8 .* = \[1152, 1\], got uint8 \[2304, 1\]"),
        (state(shape=[96, 48]), "weight: expected in_features in multiples of 32, got 48"),
        (state(blocksize=48), "expected block sizes of a power of two from 32 to 4096, got 48"),
        (state(blocksize=128), r"absmax: expected float32 .* = \[36\], got float32 \[72\]"),
        (state(nested_blocksize=-1), "expected block sizes of a power of two"),
        (state(**NESTED), r"absmax: expected uint8 .* got float32 \[72\]"),
        (state(**NESTED | {"nested_offset": float("nan")}), "expected a finite nested_offset"),
        ({"weight.absmax": torch.full((72,), torch.nan)}, "weight.absmax: expected finite values"),
        ({"weight.quant_map": torch.zeros(16)}, "weight.quant_map: expected the levels of nf4"),
        ({"weight.other": torch.zeros(16)}, "weight.other: expected no tensor of this name"),
        ({"bias": torch.zeros(47)}, r"bias: expected .* \[N\] = \[48\], got float32 \[47\]"),
    ],
)
def test_bad_tensors(change, message):
    tensors = {k: v for k, v in (bits_and_bytes() | change).items() if v is not None}
    with pytest.raises(ValueError, match="bitsandbytes: layer.*" + message):
        BitsAndBytes4Bit().read(tensors, "layer")


def test_nested_maxima_that_overflow():
    tensors = bits_and_bytes(nested=True)
    tensors["weight.nested_absmax"][0] = 3e38
    tensors["weight.nested_quant_map"][:] = 3e38
    with pytest.raises(ValueError, match="nested_absmax: expected finite maxima"):
        BitsAndBytes4Bit().read(tensors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type: expected one of"),
        ({}, "bnb_4bit_quant_type: expected one of"),
        (
            {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "int8"},
            "bnb_4bit_quant_storage: expected one of",
        ),
        ({"bnb_4bit_quant_type": "nf4", "load_in_8bit": True}, "load_in_8bit: expected one of"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match="bitsandbytes: " + message):
        BitsAndBytes4Bit.from_config(config)
    with pytest.raises(ValueError, match="bitsandbytes: quant_type: expected one of"):
        BitsAndBytes4Bit("int4")
    with pytest.raises(ValueError, match="bitsandbytes: block_size: expected a power of two"):
        BitsAndBytes4Bit(block_size=96)
