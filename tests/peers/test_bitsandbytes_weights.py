"""Layers that bitsandbytes quantizes, and its own values of them."""

import bitsandbytes
import pytest
import torch
from torch import nn

from checkpoint_layers import same
from fastweights.quantization.formats import BitsAndBytes4Bit, LLMInt8


@pytest.mark.parametrize("shape", [(48, 96), (5, 37)])
@pytest.mark.parametrize("bias", [True, False])
def test_llm_int8(shape, bias):
    n, k = shape
    linear = nn.Linear(k, n, bias=bias)
    theirs = bitsandbytes.nn.Linear8bitLt(k, n, bias=bias, has_fp16_weights=False)
    theirs.load_state_dict(linear.state_dict())
    stored = theirs.to("cpu").state_dict()
    layer = LLMInt8().read(stored)
    same(LLMInt8().write(layer), stored)
    dequantize = bitsandbytes.functional.int8_vectorwise_dequant
    steps = stored["SCB"][:, None] / 127
    change = (layer.dequantize() - dequantize(stored["weight"], stored["SCB"])).abs() / steps
    assert change.max() <= 2**-16  # theirs rounds a product of up to 127 steps twice, ours once
    x = torch.randn(3, k)
    exact = x @ (stored["weight"] * steps).T + (stored["bias"] if bias else 0)
    torch.testing.assert_close(layer.module()(x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(48, 128), (300, 96)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bits(kind, nested, shape, storage):
    n, k = shape
    theirs = bitsandbytes.nn.Linear4bit(
        k, n, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    theirs.load_state_dict(nn.Linear(k, n).state_dict())
    stored = theirs.to("cpu").state_dict()
    form = BitsAndBytes4Bit(kind, storage=storage)
    layer = form.read(stored)
    same(form.write(layer), stored)
    # A flat weight: of others its own function for CPUs mistakes the blocks.
    state = theirs.weight.quant_state
    state.shape = torch.Size([n * k])
    flat = bitsandbytes.functional.dequantize_4bit(theirs.weight.data, state)
    assert torch.equal(layer.dequantize().flatten(), flat.flatten())
