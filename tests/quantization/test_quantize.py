"""Errors of the formats beside published values, exact grids, refusals."""

import pytest
import torch

import fastweights as fw
from fastweights import functional
from fastweights.ops.quantization import reference
from fastweights.ops.quantization.formats import ALIASES, FORMATS
from fastweights.testing import assert_close, assert_equal, available_cpu_levels, cpu_level


def snr(w, approximation):
    return float(10 * torch.log10(w.square().mean() / (w - approximation).square().mean()))


# N(0, 1). Published: Q4_1 (the same grid without search, group 32) 22.14 dB, Q4_0 21.31 dB, Q8_0
# 45.42 dB; nf4, fp4, int4 of the GPTQ rule (here int4_zp) and int8 of 256 inputs are published
# themselves, their scale being a rule.
@pytest.mark.parametrize(
    ("format", "group_size", "bits", "expected"),
    [
        ("int4", 32, 5.0, 22.88),
        ("int4", 64, 4.5, 21.57),
        ("int4", 128, 4.25, 20.66),
        ("int8", 64, 8.5, 45.54),
        ("nf4", 32, 5.0, 21.18),
        ("nf4", 64, 4.5, 20.73),
        ("nf4", 128, 4.25, 20.39),
        ("nf4", 256, 4.125, 20.11),
        ("fp4", 64, 4.5, 18.28),
        ("iq4_nl", 32, 4.5, 22.57),
        ("int4_sym", 32, 4.5, 21.84),
        ("int8_sym", 32, 8.5, 45.45),
        ("int8_sym", 256, 8.0625, 43.14),
        ("int4_zp", 32, 5.0, 21.86),
        ("int4_zp", 64, 4.5, 20.82),
        ("int4_zp", 128, 4.25, 19.95),
        ("int4_zp32", 64, 5.0, 20.82),
        ("int4", 16, 6.0, 24.73),
        ("int2", 64, 2.5, 8.83),
        ("int3", 64, 3.5, 14.96),
        ("int5", 64, 5.5, 27.73),
        ("int6", 64, 6.5, 33.78),
        ("mxfp4", 32, 4.25, 18.79),
        ("fp8_e4m3", 64, 8.5, 32.02),
        ("q4_k", 32, 4.5, 22.75),
        ("q6_k", 16, 6.625, 35.47),
    ],
)
def test_error_on_a_gaussian(format, group_size, bits, expected):
    w = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    qt = fw.quantize(w, format, group_size=group_size)
    assert qt.bits_per_weight == bits
    assert abs(snr(w, fw.dequantize(qt)) - expected) < 0.05


@pytest.mark.parametrize("format", ["int2", "int3"])
def test_few_bits_keep_zero_a_level(format):
    w = torch.randn(32, 256).exp()  # no weight is near 0 but those that are
    w[:, ::3] = 0
    assert fw.dequantize(fw.quantize(w, format))[:, ::3].abs().max() < 2e-3 * w.max()


def test_a_grid_is_reproduced():
    # What a Q4_1 file holds: codes 0..15 times a float16 scale plus a float16 minimum, per 32.
    codes = torch.randint(0, 16, (48, 4, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    scale = torch.rand(48, 4, 1).half().float() + 0.125
    minimum = torch.randn(48, 4, 1).half().float()
    w = (codes * scale.half().float() + minimum).flatten(1)
    assert_close(fw.dequantize(fw.quantize(w, "int4", group_size=32)), w, tolerance=1e-3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k", "group_size"), [(37, 129, 32), (16, 64, 64), (3, 300, 128)])
def test_kernel_finds_what_the_reference_finds(format, n, k, group_size):
    w = torch.randn(n, k)
    group_size = group_size if FORMATS[format].any_group else None
    expected = reference.quantize(w, format, group_size=group_size)
    for level in available_cpu_levels():
        with cpu_level(level):
            got = fw.quantize(w, format, group_size=group_size)
            assert got.packed.shape == expected.packed.shape
            # Two fits whose errors agree to rounding may be chosen differently.
            assert (got.packed != expected.packed).float().mean() < 0.02
            errors = [(fw.dequantize(q) - w).square().mean() for q in (got, expected)]
            assert abs(float(errors[0] / errors[1]) - 1) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dequantize_matches_the_reference(dtype):
    index = torch.tensor([[36, 0, 7], [7, 15, 16]])
    for format, k in (("int4", 0), *((format, 129) for format in FORMATS)):
        qt = fw.quantize(torch.randn(37, k), format)
        expected = reference.dequantize(qt, dtype)
        tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
        for level in available_cpu_levels():
            with cpu_level(level):
                whole = fw.dequantize(qt, dtype)
                assert whole.dtype == dtype
                assert_close(whole, expected, tolerance=tolerance)
                assert_equal(functional.dequantize_rows(qt, index, dtype), whole[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_strides_and_dtypes_quantize_alike(dtype):
    w = torch.randn(20, 70).to(dtype)
    expected = fw.quantize(w.float(), "int4").packed
    assert_equal(fw.quantize(w, "int4").packed, expected)
    assert_equal(fw.quantize(w.T.contiguous().T, "int4").packed, expected)


@pytest.mark.parametrize("name", ALIASES)
def test_names_of_gguf_are_formats_at_group_32(name):
    format, group_size = ALIASES[name]
    w = torch.randn(20, 70)
    assert_equal(fw.quantize(w, name).packed, fw.quantize(w, format, group_size=32).packed)
    assert fw.quantize(w, name, group_size=32).format == format and group_size == 32


def test_equal_weights_need_no_scale():
    for value in (0.0, 0.25, -3.0):
        w = torch.full((5, 40), value)
        for format in ("int4", "int8", "nf4", "fp4"):
            assert_equal(fw.dequantize(fw.quantize(w, format)), w)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_weights_without_a_grid_are_refused(format, bad):
    w = torch.randn(20, 70)
    w[7, 65] = bad
    if bad == 1e30 and FORMATS[format].parameters.endswith(("float32", "e8m0")):
        assert fw.dequantize(fw.quantize(w, format)).isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="quantize: expected finite w"):
            fw.quantize(w, format)


def test_refusals():
    w = torch.randn(20, 70)
    with pytest.raises(ValueError, match="quantize: expected format in"):
        fw.quantize(w, "int7")
    with pytest.raises(ValueError, match="quantize: expected activation in"):
        fw.quantize(w, "int4", activation="int4")
    for format, group_size in (
        *(("int4", size) for size in (0, -64, 33, 48 + 1, 1 << 20)),
        ("int3", 16),
        ("int5_zp", 16),
        ("nf4", 16),
    ):
        with pytest.raises(RuntimeError, match="quantize: expected group_size a positive multiple"):
            fw.quantize(w, format, group_size=group_size)
    with pytest.raises(ValueError, match="quantize: expected format in"):
        fw.quantize(w, "q4_0", group_size=64)
    with pytest.raises(RuntimeError, match=r"quantize: expected w of shape \[N, K\]"):
        fw.quantize(w[0], "int4")
    qt = fw.quantize(w, "int8")
    for index in (-1, 20, 2**40):
        with pytest.raises(RuntimeError, match="dequantize_rows: expected 0 <= index < 20"):
            functional.dequantize_rows(qt, torch.tensor([0, index]))
    qt.packed[0, -1], qt.packed[0, -2] = 0x7C, 0x01
    with pytest.raises(RuntimeError, match="dequantize: expected packed with finite parameters"):
        fw.dequantize(qt)


@pytest.mark.parametrize("op", ["dequantize", "dequantize_rows", "quantize"])
def test_fakes_agree_with_the_ops(op):
    qt = fw.quantize(torch.randn(37, 129), "int4", group_size=32)
    layout = ("int4", 37, 129, 32)
    args = {
        "quantize": (torch.randn(37, 129), "int8", 64),
        "dequantize": (qt.packed, *layout, torch.float16),
        "dequantize_rows": (qt.packed, torch.tensor([1, 36]), *layout, torch.float32),
    }[op]
    torch.library.opcheck(getattr(torch.ops.fastweights, op).default, args)
