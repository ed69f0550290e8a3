"""The code-book formats beside their definitions: levels, rounding, scales, others' files."""

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

import fastweights as fw
from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.layout import pack, pack_stored, unpack
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
    return codes, scale, pack(codes, scale, None, format, (16, 64), "float")


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
    qt = pack(codes, scale, None, format, (16, 64), "int8")
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
    # The largest magnitude falls into [4, 8), is clamped to 6; halfway goes to the even mantissa.
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


def halves(seed, *shape):
    """float16 numbers as numpy bytes and as float32."""
    stored = np.random.default_rng(seed).standard_normal(shape).astype(np.float16)
    return stored[..., None].view(np.uint8), torch.from_numpy(stored.astype(np.float32))


def integers(seed, low, high, *shape):
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.int16)


def pairs(codes):
    """Nibbles as llama.cpp's older blocks of 32 have them."""
    return (codes[..., :16] | codes[..., 16:] << 4).astype(np.uint8)


# Each function makes blocks of a GGUF file for a weight [48, 512] and what QuantizedTensor stores.


def q4_0():
    (d, scale), codes = halves(1, 48, 16), integers(2, 0, 16, 48, 16, 32)
    return np.concatenate([d, pairs(codes)], 2), "int4_sym", codes, (scale,)


def q4_1():
    (d, scale), (m, minimum) = halves(1, 48, 16), halves(3, 48, 16)
    codes = integers(2, 0, 16, 48, 16, 32)
    return np.concatenate([d, m, pairs(codes)], 2), "int4", codes, (scale, minimum)


def fifth_bits(codes):
    bits = (codes >> 4).astype(np.uint64) << np.arange(32, dtype=np.uint64)
    return bits.sum(2).astype(np.uint32)[..., None].view(np.uint8)


def q5_0():
    (d, scale), codes = halves(1, 48, 16), integers(2, 0, 32, 48, 16, 32)
    blocks = np.concatenate([d, fifth_bits(codes), pairs(codes & 15)], 2)
    return blocks, "int5", codes, (scale, -16 * scale)


def q5_1():
    (d, scale), (m, minimum) = halves(1, 48, 16), halves(3, 48, 16)
    codes = integers(2, 0, 32, 48, 16, 32)
    blocks = np.concatenate([d, m, fifth_bits(codes), pairs(codes & 15)], 2)
    return blocks, "int5", codes, (scale, minimum)


def q8_0():
    (d, scale), codes = halves(1, 48, 16), integers(2, -128, 128, 48, 16, 32)
    bytes_ = codes.astype(np.int8).view(np.uint8)
    return np.concatenate([d, bytes_], 2), "int8_sym", bytes_, (scale,)


def iq4_nl():
    (d, scale), codes = halves(1, 48, 16), integers(2, 0, 16, 48, 16, 32)
    return np.concatenate([d, pairs(codes)], 2), "iq4_nl", codes, (scale,)


def mxfp4():
    # From 2 on: kernels take numbers below 2^-126 for zero.
    exponents, codes = integers(1, 2, 250, 48, 16), integers(2, 0, 16, 48, 16, 32)
    scale = torch.from_numpy(exponents.astype(np.float64) - 127).exp2().float()
    blocks = np.concatenate([exponents[..., None].astype(np.uint8), pairs(codes)], 2)
    return blocks, "mxfp4", codes, (scale,)


def q4_k():
    (d, scale), (m, minimum) = halves(1, 48, 2), halves(3, 48, 2)
    codes = integers(2, 0, 16, 48, 2, 4, 2, 32)
    sc, mins = integers(4, 0, 64, 48, 2, 8), integers(5, 0, 64, 48, 2, 8)
    six = np.concatenate(
        [
            sc[..., :4] | (sc[..., 4:] >> 4 << 6),
            mins[..., :4] | (mins[..., 4:] >> 4 << 6),
            (sc[..., 4:] & 15) | ((mins[..., 4:] & 15) << 4),
        ],
        2,
    )
    nibbles = (codes[..., 0, :] | codes[..., 1, :] << 4).reshape(48, 2, 128)
    blocks = np.concatenate([d, m, six.astype(np.uint8), nibbles.astype(np.uint8)], 2)
    per_group = [t.repeat_interleave(8, 1) for t in (scale, minimum)]
    parts = [torch.from_numpy(t.reshape(48, 16)) for t in (sc, mins)]
    return blocks, "q4_k", codes.reshape(48, 16, 32), (*per_group, *parts)


def q6_k():
    (d, scale), codes = halves(1, 48, 2), integers(2, 0, 64, 48, 2, 2, 4, 32)
    sc = integers(4, -128, 128, 48, 2, 16)
    low = np.concatenate([codes[..., :2, :] & 15, codes[..., 2:, :] & 15], -2)
    low = low[..., :2, :] | low[..., 2:, :] << 4
    high = sum((codes[..., i, :] >> 4) << (2 * i) for i in range(4))
    parts = [low.reshape(48, 2, 128), high.reshape(48, 2, 64), sc.astype(np.int8).view(np.uint8), d]
    blocks = np.concatenate([t.astype(np.uint8) for t in parts], 2)
    scales = torch.from_numpy(sc.reshape(48, 32))
    return blocks, "q6_k", codes.reshape(48, 32, 16), (scale.repeat_interleave(16, 1), scales)


@pytest.mark.parametrize("make", [q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, mxfp4, q4_k, q6_k])
def test_blocks_of_gguf_decode_to_the_same_numbers(make):
    blocks, format, codes, parameters = make()
    kind = getattr(gguf.GGMLQuantizationType, make.__name__.upper())
    expected = torch.from_numpy(quants.dequantize(blocks.reshape(48, -1), kind))
    codes = torch.from_numpy(codes.astype(np.uint8))
    qt = pack_stored(codes, parameters, format, (48, 512), "float")
    for level in available_cpu_levels():
        with cpu_level(level):
            assert_equal(fw.dequantize(qt), expected)


def test_six_bit_scales_are_packed_as_in_llama_cpp():
    sc, m = torch.tensor([1, 2, 3, 4, 21, 38, 55, 63]), torch.tensor([5, 6, 7, 8, 17, 34, 51, 60])
    ones = torch.ones(1, 8)
    codes = torch.zeros(1, 8, 32, dtype=torch.uint8)
    qt = pack_stored(codes, (ones, ones, sc[None], m[None]), "q4_k", (1, 256), "float")
    rows = qt.packed[0, -192:].view(12, 16)[:, 0]
    assert bytes(rows.tolist()).hex() == "4182c3c44586c7c8152637cf"


def test_integer_zero_points_are_exact():
    # As GPTQ, AWQ and ONNX have them; -scale * zero in float16 would be off by half an ulp.
    codes = torch.from_numpy(integers(1, 0, 16, 48, 4, 128))
    scale = torch.from_numpy(halves(2, 48, 4)[1].numpy())[..., None]
    zero = torch.from_numpy(integers(3, 0, 16, 48, 4, 1))
    expected = (scale * (codes - zero)).flatten(1)
    rounded = pack(codes, scale, -scale * zero, "int4", (48, 512), "float")
    qt = pack(codes, scale, zero.float(), "int4_zp", (48, 512), "float")
    for level in available_cpu_levels():
        with cpu_level(level):
            assert_equal(fw.dequantize(qt), expected)
            assert not torch.equal(fw.dequantize(rounded), expected)


def test_float32_scales_are_exact():
    # LLM.int8: a row's largest magnitude in float32, one group per row, all 256 codes.
    codes = torch.from_numpy(integers(1, -128, 128, 48, 1, 512))
    scale = torch.rand(48, 1, 1) / 127
    qt = pack(codes, scale, torch.zeros(48, 1, 1), "int8_zp32", (48, 512), "float")
    expected = (scale * codes).flatten(1)
    for level in available_cpu_levels():
        with cpu_level(level):
            assert_equal(fw.dequantize(qt), expected)
            assert_equal(fw.quantized_linear(torch.eye(512)[5], qt), expected[:, 5])
    assert_equal(unpack(qt)[1], scale)


def test_zero_points_follow_the_rule_of_gptq():
    w = torch.tensor([[-1.0, 0.6, 2.0, 0.0], [1.0, 2.0, 3.0, 0.2], [-3.0, -1.0, -2.0, -0.2]])
    codes, scale, minimum = unpack(fw.quantize(w, "int4_zp32"))
    assert_close(scale.flatten(), torch.tensor([3.0, 3.0, 3.0]) / 15, tolerance=1e-6)
    assert_close(-minimum / scale, torch.tensor([5.0, 0.0, 15.0]).view(3, 1, 1), tolerance=1e-6)
    assert codes[:, 0, :4].tolist() == [[0, 8, 15, 5], [5, 10, 15, 1], [0, 10, 5, 14]]


def test_mxfp4_quantizes_as_gguf():
    w = torch.randn(48, 128)
    kind = gguf.GGMLQuantizationType.MXFP4
    expected = quants.dequantize(quants.quantize(w.numpy(), kind), kind)
    assert_equal(fw.dequantize(fw.quantize(w, "mxfp4")), torch.from_numpy(expected))
