"""GPTQ and AWQ layers as the packages that brought the formats up pack and dequantize them.

Their modules are loaded one by one: the packages as a whole need older versions of transformers.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoint_layers import awq, same
from fastweights.quantization.formats import AWQ, GPTQ


def module(package, path):
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), Path(folder, path))
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def quant_linear():
    return module("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py").QuantLinear


@pytest.fixture(scope="module")
def packing():
    return module("awq", "utils/packing_utils.py")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(quant_linear, bits, group, act_order):
    """Packed and multiplied by AutoGPTQ; read, multiplied and written by us."""
    n, k = 64, 96
    g = torch.Generator().manual_seed(0)
    groups = 1 if group == -1 else k // group
    scales = (torch.rand(n, groups, generator=g) * 0.01 + 0.001).half().float()
    zeros = torch.randint(1, 1 << bits, (n, groups), generator=g).float()
    g_idx = (torch.arange(k) // (k // groups)).int()
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=g)]
    linear = nn.Linear(k, n)
    codes = torch.randint(1 << bits, (n, k), generator=g)
    expected = scales[:, g_idx.long()] * (codes - zeros[:, g_idx.long()])
    linear.weight.data = expected
    theirs = quant_linear(bits, group, k, n, bias=True)
    theirs.pack(linear, scales, zeros.clone(), g_idx)
    stored = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    layer = GPTQ(bits, group).read(stored)
    assert torch.equal(layer.dequantize(), expected)
    same(GPTQ(bits, group).write(layer), stored)
    x = torch.randn(3, k, generator=g)
    torch.testing.assert_close(layer.module()(x), theirs(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("group", [32, 128])
def test_awq(packing, group):
    stored = awq(group=group)
    layer = AWQ(group).read(stored)
    tensors = (stored["qweight"], stored["qzeros"], stored["scales"].double())
    theirs = packing.dequantize_gemm(*tensors, 4, group).T
    assert torch.equal(layer.dequantize(torch.float64), theirs)


def test_awq_as_gptq(packing):
    """The same layer in both formats, as AutoAWQ converts it for the kernels of GPTQ."""
    stored = awq(n=64, k=128, bias=False)
    stored["qzeros"] |= 0x11111111  # theirs has no 0, which is stored as 15
    written = GPTQ(4, 32).write(AWQ(32).read(stored))
    qweight, qzeros = packing.unpack_reorder_pack(stored["qweight"], stored["qzeros"], 4)
    assert torch.equal(written["qweight"], qweight)
    assert torch.equal(written["qzeros"], qzeros)
    assert torch.equal(written["scales"], stored["scales"])
