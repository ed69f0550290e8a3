import pytest
import torch

from fastweights.adapters import LoRALinear, add_lora, lora_disabled, merge_lora

from .conftest import tiny


def adapted():
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(12, 7).double(), rank=3, alpha=6)
    return layer, torch.randn(5, 12, dtype=torch.float64)


def test_lora_starts_as_its_base():
    layer, x = adapted()
    assert torch.equal(layer(x), layer.base(x))


def test_lora_is_the_equation_with_gradients_of_a_and_b_only():
    layer, x = adapted()
    torch.nn.init.normal_(layer.lora_b)
    w = layer.base.weight + 6 / 3 * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer(x), x @ w.T + layer.base.bias)
    layer(x).square().sum().backward()
    assert (
        layer.base.weight.grad is None
        and layer.lora_a.grad is not None
        and layer.lora_b.grad is not None
    )


def test_lora_merging_keeps_the_function():
    layer, x = adapted()
    torch.nn.init.normal_(layer.lora_b)
    model = torch.nn.Sequential(layer)
    expected = model(x)
    merge_lora(model)
    assert type(model[0]) is torch.nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_lora_can_be_switched_off():
    layer, x = adapted()
    torch.nn.init.normal_(layer.lora_b)
    with lora_disabled(layer):
        assert torch.equal(layer(x), layer.base(x))
    assert not torch.allclose(layer(x), layer.base(x))


def test_lora_bad_arguments():
    with pytest.raises(ValueError, match="expected rank >= 1, got 0"):
        LoRALinear(torch.nn.Linear(2, 2), rank=0)
    with pytest.raises(ValueError, match="expected linear layers named nothing, found none"):
        add_lora(tiny(), ("nothing",))
