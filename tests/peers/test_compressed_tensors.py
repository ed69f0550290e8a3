"""Our reader and writer of packed checkpoints against the package that defines them."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from fastweights.quantization.formats import CompressedTensors


def compressed(bits, group, symmetric, dtype, shape=(48, 128)):
    """A layer as the package quantizes and stores it, and its own reading of it."""
    weight = torch.randn(shape, dtype=dtype)
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel",
        group_size=group,
    )  # fmt: skip
    groups = weight.unflatten(1, (-1, group or shape[1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = PackedQuantizationCompressor.compress(state, scheme)
    return stored, PackedQuantizationCompressor.decompress(stored, scheme)["weight"]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_its_files(bits, group, symmetric):
    stored, theirs = compressed(bits, group, symmetric, torch.float32)
    form = CompressedTensors(bits, group or -1, symmetric)
    layer = form.read(stored)
    steps = stored["weight_scale"].repeat_interleave(group or 128, 1)
    change = (layer.dequantize() - theirs).abs() / steps
    assert change.max() <= 2.0 ** (bits - 23)  # one rounding of theirs, one of scale * zero of ours
    again = form.write(layer)
    assert again.keys() == stored.keys()
    for name in again:
        assert torch.equal(again[name], stored[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_half_precision_is_exact(dtype, bits):
    """To the last bit of the dtype in which the package dequantizes."""
    stored, theirs = compressed(bits, 32, True, dtype)
    assert torch.equal(CompressedTensors(bits, 32).read(stored).dequantize().to(dtype), theirs)
