"""AWQ checkpoints, against the layout's definition written out as loops."""

import pytest
import torch

from checkpoint_layers import awq as checkpoint
from checkpoint_layers import bit_stream, check_values, int32, same
from fastweights.ops.quantization.layout import unpack
from fastweights.quantization.formats import AWQ, GPTQ

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def deinterleaved(words):
    """Codes of the outputs: nibble i of word c is output 8 c + ORDER[i]."""
    codes = [0] * (8 * len(words))
    for c, word in enumerate(words):
        for i, code in enumerate(bit_stream([word], 4)):
            codes[8 * c + ORDER[i]] = code
    return torch.tensor(codes)


def definition(tensors, group):
    """W[n, k] = scales[g, n] * (code[k, n] - zero[g, n]) in float64."""
    codes = torch.stack([deinterleaved(row) for row in tensors["qweight"]]).double()
    zeros = torch.stack([deinterleaved(row) for row in tensors["qzeros"]]).double()
    groups = torch.arange(len(codes)) // group
    return (tensors["scales"].double()[groups] * (codes - zeros[groups])).T


@pytest.mark.parametrize(("n", "k"), [(64, 128), (24, 96)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_against_the_definition(n, k, dtype):
    tensors = checkpoint(n, k, dtype=dtype)
    layer = AWQ(32).read(tensors)
    steps = tensors["scales"].double()[torch.arange(k) // 32].T
    check_values(layer, definition(tensors, 32), steps, 4)
    same(AWQ(32).write(layer), tensors)


def test_the_sheets_word():
    tensors = checkpoint(16, 32)
    tensors["qweight"][:] = int32(0x75316420)
    codes = unpack(AWQ(32).read(tensors).weight)[0]
    assert codes[:, 0, 0].tolist() == [*range(8)] * 2


def test_one_scale_for_all_inputs():
    tensors = checkpoint(group=128)
    same(AWQ(-1).write(AWQ(-1).read(tensors)), tensors)


@pytest.mark.parametrize("version", [1, 2])
def test_as_gptq_and_back(version):
    """Both ways between the formats, without a rounding."""
    tensors = checkpoint()
    layer, form = AWQ(32).read(tensors), GPTQ(4, 32, version)
    other = form.write(layer)
    assert torch.equal(form.read(other).weight.packed, layer.weight.packed)
    same(AWQ(32).write(form.read(other)), tensors)


def test_what_it_cannot_hold():
    from checkpoint_layers import gptq

    with pytest.raises(ValueError, match="awq: expected inputs in the order of their groups"):
        AWQ(32).write(GPTQ(4, 32).read(gptq(act_order=True)))
    with pytest.raises(ValueError, match="awq: expected integer zero points from 0 to 15"):
        AWQ(32).write(GPTQ(8, 32).read(gptq(bits=8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": None}, r"awq: layer\.qweight: expected \[in_features, N / 8\], got none"),
        ({"qweight": torch.zeros(128)}, r"layer\.qweight: expected int32 .*, got float32 \[128\]"),
        ({"qzeros": int32(0)}, r"qzeros: expected .* = \[4, 8\], got int32 \[1\]"),
        ({"scales": torch.full((4, 64), torch.inf)}, r"layer\.scales: expected finite values"),
        ({"scales": torch.full((4, 64), 3e38)}, r"expected scale \* \(code - zero\) to be finite"),
        ({"bias": torch.full((64,), torch.nan)}, r"layer\.bias: expected finite values"),
        ({"g_idx": int32(0)}, r"layer\.g_idx: expected no tensor of this name"),
    ],
)
def test_bad_tensors(change, message):
    tensors = {k: v for k, v in (checkpoint() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        AWQ(32).read(tensors, "layer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemv"}, "awq: version: expected gemm, got 'gemv'"),
        ({"version": "gemv_fast"}, "awq: version: expected gemm, got 'gemv_fast'"),
        ({"version": 1}, "awq: version: expected gemm, got 1"),
        ({"bits": 3}, "awq: bits: expected 4, got 3"),
        ({"bits": None}, "awq: bits: expected an integer, got None"),
        ({"group_size": 24}, "awq: group_size: expected -1, a multiple of 32, or 16, up to"),
        ({"zero_point": False}, "awq: zero_point: expected one of"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        AWQ.from_config({"bits": 4, "group_size": 128, "version": "gemm"} | change)


def test_configs():
    assert AWQ.from_config({"bits": 4, "group_size": 64, "zero_point": True}) == AWQ(64)
    assert AWQ.from_config({"w_bit": 4, "q_group_size": 128, "version": "GEMM"}) == AWQ(128)
