"""QuantizedLinear, QuantizedEmbedding, fuse_linears, quantize_."""

import copy
import io

import pytest
import torch
from torch import nn

import fastweights as fw
from fastweights.nn import QuantizedEmbedding, QuantizedLinear, fuse_linears
from fastweights.testing import assert_close, assert_equal


class Tied(nn.Module):
    """A decoder's ends: embedding, a block, a head that shares the embedding's weight."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.block = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64, bias=False))
        self.lm_head = nn.Linear(64, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.block(self.embed(ids)))


def layer(activation="float"):
    return QuantizedLinear.from_linear(nn.Linear(100, 40), "int4", activation=activation)


def test_from_linear_computes_with_the_dequantized_weight():
    linear = nn.Linear(100, 40)
    quantized = QuantizedLinear.from_linear(linear, "int8", group_size=32)
    x = torch.randn(2, 3, 100)
    expected = nn.functional.linear(x, fw.dequantize(quantized.weight), linear.bias)
    assert_close(quantized(x), expected, tolerance=1e-5)
    assert_close(quantized(x), linear(x), tolerance=0.02)


def test_repr_shows_the_mode():
    assert repr(layer("int8")) == (
        "QuantizedLinear(100, 40, bias=True, int4, group_size=64, activation=int8)"
    )


def test_state_dict_round_trip_through_a_file():
    source, target = layer(), layer()
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 100)
    assert_equal(target(x), source(x))


def test_an_altered_file_is_refused():
    target = layer()
    state = target.state_dict()
    with pytest.raises(ValueError, match="packed: expected uint8 of shape"):
        target.load_state_dict(state | {"packed": state["packed"][:, :-64]})
    broken = state["packed"].clone()
    broken[0, -2:] = 0xFF
    with pytest.raises(ValueError, match="packed: expected finite scales"):
        target.load_state_dict(state | {"packed": broken})


def test_deepcopy_and_to_leave_the_weight_alone():
    source = layer()
    copied = copy.deepcopy(source).to(torch.bfloat16)
    assert copied.packed.data_ptr() != source.packed.data_ptr()
    assert_equal(copied.packed, source.packed)
    assert copied(torch.randn(2, 100, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer().to("meta").packed.is_meta


def test_compile_and_export():
    module = layer("int8")
    x = torch.randn(3, 100)
    expected = module(x)
    torch._dynamo.reset()
    assert_equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert_equal(exported.module()(x), expected)
    torch._dynamo.reset()


def test_gradient_reaches_input_and_bias():
    module, x = layer(), torch.randn(3, 100, requires_grad=True)
    module(x).sum().backward()
    assert_close(x.grad, fw.dequantize(module.weight).sum(0).expand(3, 100), tolerance=1e-5)
    assert_equal(module.bias.grad, torch.full((40,), 3.0))


@pytest.mark.parametrize("bias", [True, False])
def test_fused_linears_give_the_same_bits(bias):
    layers = [
        QuantizedLinear.from_linear(nn.Linear(100, n, bias=bias), "int4", activation="int8")
        for n in (48, 16, 37)
    ]
    x = torch.randn(5, 100)
    parts = fuse_linears(layers)(x).split([48, 16, 37], -1)
    for part, one in zip(parts, layers, strict=True):
        assert_equal(part, one(x))


def test_ordered_inputs():
    order = torch.randperm(100)
    linear = nn.Linear(100, 48)
    weight = fw.quantize(linear.weight[:, order], "int8", group_size=32)
    module = QuantizedLinear(weight, linear.bias, order)
    x = torch.randn(5, 100)
    assert_close(module(x), linear(x), tolerance=0.02)
    assert repr(module).endswith("activation=float, ordered)")
    assert_equal(fuse_linears([module, module])(x), torch.cat([module(x)] * 2, -1))
    plain = QuantizedLinear(weight, linear.bias)
    with pytest.raises(ValueError, match="fuse_linears: expected layers of one order"):
        fuse_linears([module, plain])
    with pytest.raises(ValueError, match="order: expected int64, a permutation of 0 to 99"):
        QuantizedLinear(weight, None, torch.zeros(100).long())
    with pytest.raises(ValueError, match="order: expected int64, a permutation of 0 to 99"):
        module.load_state_dict(module.state_dict() | {"order": order[:-1]})


def test_linears_that_do_not_fuse():
    odd = QuantizedLinear.from_linear(nn.Linear(100, 37), "int4")
    with pytest.raises(ValueError, match="multiples of 16"):
        fuse_linears([odd, layer()])
    with pytest.raises(ValueError, match="one activation"):
        fuse_linears([layer(), layer("int8")])
    with pytest.raises(ValueError, match="at least one"):
        fuse_linears([])
    with pytest.raises(ValueError, match="a bias"):
        fuse_linears([layer(), QuantizedLinear(layer().weight)])


def test_quantize_swaps_linears_and_keeps_tied_ends():
    model, ids = Tied(), torch.arange(12).view(2, 6)
    expected = model(ids)
    assert fw.quantize_(model, "int8", group_size=32) is model
    assert isinstance(model.block[0], QuantizedLinear)
    assert type(model.embed) is nn.Embedding and type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.embed.weight
    assert_close(model(ids), expected, tolerance=0.03)


def test_tied_ends_share_one_packed_tensor():
    model, ids = Tied(), torch.arange(12).view(2, 6)
    expected = model(ids)
    fw.quantize_(model, "int8", activation="int8", embedding_format="int8")
    assert isinstance(model.embed, QuantizedEmbedding)
    assert model.lm_head.packed.data_ptr() == model.embed.packed.data_ptr()
    assert model.lm_head.activation == "int8"
    assert_close(model(ids), expected, tolerance=0.05)
    assert_equal(model.embed(ids), fw.dequantize(model.embed.weight)[ids])


def test_skip_by_name_and_by_predicate():
    model = fw.quantize_(Tied(tied=False), skip=("block.0",))
    assert type(model.block[0]) is nn.Linear and isinstance(model.lm_head, QuantizedLinear)
    model = fw.quantize_(Tied(tied=False), skip=lambda name, module: module.bias is None)
    assert isinstance(model.block[0], QuantizedLinear) and type(model.block[2]) is nn.Linear
    with pytest.raises(ValueError, match=r"quantize_: expected a model with nn\.Linear layers"):
        fw.quantize_(nn.Sequential(nn.ReLU()))


def test_a_module_with_two_names_is_swapped_once():
    shared = nn.Linear(64, 64)
    model = fw.quantize_(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert isinstance(model["a"], QuantizedLinear) and model["a"] is model["b"][0]
