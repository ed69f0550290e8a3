"""PEFT's adapters over 4- and 8-bit layers of bitsandbytes, with our op for the update."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fastweights.integrations.peft import patched, stats


def nf4():
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    weight = torch.randn(32, 64)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer


def int8():
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(32, 64), requires_grad=False)
    return layer


@pytest.mark.parametrize("base", [nf4, int8])
@pytest.mark.parametrize("names", [None, ["one", "__base__", "two"]])
def test_inference_is_served_and_training_is_pefts(base, names):
    torch.manual_seed(0)
    model = nn.Sequential(base().to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = base is nf4, base is int8
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"]), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    layer, x = model.base_model.model[0].eval(), torch.randn(3, 64)
    nn.init.normal_(layer.lora_B["one"].weight)
    options = {} if names is None else {"adapter_names": names}
    with torch.no_grad():
        expected = layer(x, **options)
        with patched():
            torch.testing.assert_close(layer(x, **options), expected, rtol=1e-5, atol=1e-4)
            assert stats()["lora_linear"] == 1
    y = layer(x)
    (grad,) = torch.autograd.grad(y.sum(), layer.lora_A["one"].weight)
    with patched():
        got = layer(x)
        assert stats()["lora_linear"] == 0 and torch.equal(got, y)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), layer.lora_A["one"].weight)[0], grad
        )
