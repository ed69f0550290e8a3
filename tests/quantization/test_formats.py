"""The code-book formats beside their definitions: levels, rounding, scales, others' files."""

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

import fastweights as fw
from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.layout import pack, unpack
from fastweights.testing import assert_close, assert_equal, available_cpu_levels, cpu_level

BOOKS = ["nf4", "fp4", "iq4_nl", "mxfp4"]


def codes_of(w, format):
    """Codes `[K]` of one row, the same at every level."""
    found = []
    for level in available_cpu_levels():
        with cpu_level(level):
            found.append(unpack(fw.quantize(w[None], format))[0].flatten()[: len(w)])
    assert all(torch.equal(codes, found[0]) for codes in found)
    return found[0]


def every_code(format):
    """A weight [16, 64] that has every code in every output, and its scales."""
    codes = torch.arange(64).remainder(16).repeat(16, 1).to(torch.uint8)
    codes = codes.unflatten(1, (-1, FORMATS[format].group_size))
    scale = torch.linspace(0.5, 2, codes.shape[0] * codes.shape[1]).view(16, -1, 1)
    scale = scale.half().float() if format != "mxfp4" else scale.log2().round().exp2()
    return codes, scale, pack(codes, scale, torch.zeros_like(scale), format, (16, 64), "float")


@pytest.mark.parametrize("format", BOOKS)
def test_every_code_has_its_level(format):
    codes, scale, qt = every_code(format)
    expected = (torch.tensor(FORMATS[format].levels)[codes.long()] * scale).flatten(1)
    assert_equal(fw.dequantize(qt), expected)
    for level in available_cpu_levels():
        with cpu_level(level):
            # One input at a time, so that nothing is summed.
            assert_equal(fw.quantized_linear(torch.eye(64), qt), expected.T.contiguous())
            assert_equal(fw.quantized_linear(torch.eye(64)[7], qt), expected[:, 7])


@pytest.mark.parametrize("format", BOOKS)
def test_int8_activations_meet_the_image(format):
    form = FORMATS[format]
    codes, scale, _ = every_code(format)
    qt = pack(codes, scale, torch.zeros_like(scale), format, (16, 64), "int8")
    image = torch.tensor(form.image) * form.image_unit
    expected = (image[codes.long()] * scale).flatten(1).T
    for level in available_cpu_levels():
        with cpu_level(level):
            for rows in (torch.eye(64), torch.eye(64)[:3]):
                assert_close(fw.quantized_linear(rows, qt), expected[: len(rows)], tolerance=1e-6)
    exact = torch.tensor(form.levels, dtype=torch.float32)
    largest = {"nf4": 1 / 254, "fp4": 1 / 192}.get(format, 0.0)
    assert (image - exact).abs().max() <= largest + 1e-7


def test_the_image_of_nf4_costs_little():
    w = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    w = w[:, :64].contiguous()
    y = fw.quantized_linear(torch.eye(64), fw.quantize(w, "nf4", activation="int8")).T
    snr = 10 * torch.log10(w.square().mean() / (w - y).square().mean())
    assert abs(float(snr) - 20.70) < 0.08


def test_nf4_rounds_as_bitsandbytes():
    w = torch.tensor([0.5, -1, 0.25, 0.1, -0.3, 0, 0.9, -0.05])
    assert codes_of(w, "nf4").tolist() == [12, 0, 10, 8, 4, 7, 15, 6]
    # A threshold itself goes down, what is above it goes up.
    levels = torch.tensor(FORMATS["nf4"].levels)
    middles = (levels[1:] + levels[:-1]) / 2
    above = torch.nextafter(middles, torch.tensor(2.0))
    got = codes_of(torch.cat([torch.ones(1), middles, above]), "nf4")[1:]
    assert got.tolist() == [*range(15), *range(1, 16)]


def test_fp4_rounds_as_bitsandbytes():
    # By magnitude: thresholds between 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3 and 1. Of the two zeros
    # bitsandbytes gives the second one to small positive numbers.
    middles = [0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    w = torch.tensor([1.0, 0.0, -0.001, 0.001, 0.0027, -0.0027])
    assert codes_of(w, "fp4").tolist() == [3, 0, 0, 8, 1, 9]
    below = torch.tensor([1.0] + [m - 1e-4 for m in middles])
    above = torch.tensor([1.0] + [m + 1e-4 for m in middles])
    assert codes_of(below, "fp4").tolist() == [3, 1, 6, 7, 4, 5, 2]
    assert codes_of(above, "fp4").tolist() == [3, 6, 7, 4, 5, 2, 3]
    assert codes_of(-above, "fp4").tolist() == [11, 14, 15, 12, 13, 10, 11]


def test_mxfp4_scales_and_rounds_as_its_standard():
    # The largest magnitude falls into [4, 8) and is clamped to 6; halfway goes to the even mantissa.
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.5])
    assert codes_of(halfway, "mxfp4").tolist() == [0, 2, 2, 4, 4, 6, 6, 7]
    assert codes_of(-halfway, "mxfp4").tolist() == [0, 10, 10, 12, 12, 14, 14, 15]
    for exponent in (-149, -130, -127, -20, 0, 100, 127):
        w = torch.tensor([1.5, -1.0, 0.0]).double().mul(2.0**exponent).float()[None]
        qt = fw.quantize(w, "mxfp4")
        _, scale, _ = unpack(qt)
        assert scale.item() == 2.0 ** max(exponent - 2, -127)
        if exponent - 2 >= -127:
            assert_equal(fw.dequantize(qt), w)


def test_a_grid_of_iq4_nl_is_reproduced():
    _, _, qt = every_code("iq4_nl")
    again = fw.quantize(fw.dequantize(qt), "iq4_nl")
    assert_equal(again.packed, qt.packed)


@pytest.mark.parametrize(("format", "kind"), [("iq4_nl", "IQ4_NL"), ("mxfp4", "MXFP4")])
def test_blocks_of_gguf_decode_to_the_same_numbers(format, kind):
    n, k = 48, 128
    codes = np.random.default_rng(0).integers(0, 16, (n, k // 32, 32), dtype=np.uint8)
    nibbles = codes[..., :16] | codes[..., 16:] << 4
    if format == "mxfp4":
        scales = np.random.default_rng(1).integers(0, 250, (n, k // 32, 1), dtype=np.uint8)
        exponents = torch.from_numpy(scales.astype(np.float64)) - 127
        scale = exponents.exp2().float()
    else:
        stored = np.random.default_rng(1).standard_normal((n, k // 32, 1)).astype(np.float16)
        scale, scales = torch.from_numpy(stored.astype(np.float32)), stored.view(np.uint8)
    blocks = np.concatenate([scales, nibbles], 2).reshape(n, -1)
    expected = quants.dequantize(blocks, getattr(gguf.GGMLQuantizationType, kind))
    qt = pack(torch.from_numpy(codes), scale, torch.zeros_like(scale), format, (n, k), "float")
    assert_equal(fw.dequantize(qt), torch.from_numpy(expected))


def test_mxfp4_quantizes_as_gguf():
    w = torch.randn(48, 128)
    kind = gguf.GGMLQuantizationType.MXFP4
    expected = quants.dequantize(quants.quantize(w.numpy(), kind), kind)
    assert_equal(fw.dequantize(fw.quantize(w, "mxfp4")), torch.from_numpy(expected))
