"""8-bit checkpoints of bitsandbytes."""

import pytest
import torch

from checkpoint_layers import gptq, llm_int8, same
from fastweights.quantization.formats import GPTQ, LLMInt8


def test_against_the_definition():
    tensors = llm_int8()
    layer = LLMInt8().read(tensors)
    expected = tensors["weight"].double() * tensors["SCB"].double()[:, None] / 127
    change = (layer.dequantize(torch.float64) - expected).abs() / expected.abs()
    assert 0 < change[expected != 0].max() <= 2**-24
    same(LLMInt8().write(layer), tensors)


def test_a_row_of_zeros_and_inputs_that_are_no_multiple():
    tensors = llm_int8(n=3, k=37)
    tensors["SCB"][1] = 0
    tensors.pop("weight_format")
    form = LLMInt8(weight_format=False)
    layer = form.read(tensors)
    assert not layer.dequantize()[1].any()
    same(form.write(layer), tensors)


def test_scales_that_float16_holds_are_exact():
    tensors = llm_int8()
    tensors["SCB"] = 127 * torch.logspace(-8, -3, 48, 2).round(decimals=3).half().float()
    layer = LLMInt8().read(tensors)
    assert layer.weight.format == "int8_zp"
    same(LLMInt8().write(layer), tensors)


def test_a_code_of_minus_128():
    tensors = llm_int8()
    tensors["weight"][5] = -128
    layer = LLMInt8().read(tensors, activation="int8")
    same(LLMInt8().write(layer), tensors)
    x = torch.full((1, 96), -1.0)
    torch.testing.assert_close(layer.module()(x), x @ layer.dequantize().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(48, 96)}, r"layer\.weight: expected int8 .*, got float32 \[48, 96"),
        ({"SCB": None}, r"layer\.SCB: expected \[N\], got none"),
        ({"SCB": torch.zeros(47)}, r"layer\.SCB: expected float32 \[N\] = \[48\], got float32"),
        ({"SCB": torch.full((48,), torch.nan)}, r"layer\.SCB: expected finite values"),
        ({"SCB": torch.full((48,), 3.4e38)}, r"expected scale \* \(code - zero\) to be finite"),
        ({"weight_format": torch.tensor(1).byte()}, r"weight_format: expected 0, .*, got 1"),
        ({"weight_format": torch.zeros(1).byte()}, r"weight_format: expected uint8 a number"),
        ({"absmax": torch.zeros(1)}, r"layer\.absmax: expected no tensor of this name"),
    ],
)
def test_bad_tensors(change, message):
    tensors = {k: v for k, v in (llm_int8() | change).items() if v is not None}
    with pytest.raises(ValueError, match="bitsandbytes: .*" + message):
        LLMInt8().read(tensors, "layer")


def test_what_it_cannot_hold():
    with pytest.raises(ValueError, match="bitsandbytes: expected group_size 128, got 32"):
        LLMInt8().write(GPTQ(8, 32).read(gptq(bits=8)))
    with pytest.raises(ValueError, match="bitsandbytes: expected a symmetric weight"):
        LLMInt8().write(GPTQ(8, -1).read(gptq(bits=8, group=128)))


def test_configs():
    assert LLMInt8.from_config({"load_in_8bit": True, "load_in_4bit": False}) == LLMInt8()
    for config in ({"load_in_4bit": True}, {"load_in_8bit": True, "load_in_4bit": True}):
        with pytest.raises(ValueError, match=r"bitsandbytes: load_in_.bit: expected one of"):
            LLMInt8.from_config(config)
