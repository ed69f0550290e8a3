"""The dynamic 8-bit maps: the sheet's numbers, nearest codes, and what coding twice does."""

import pytest
import torch

from fastweights.functional import dequantize_blockwise, dynamic_map, quantize_blockwise
from fastweights.testing import available_cpu_levels, cpu_level

LEVELS = pytest.mark.parametrize("level", available_cpu_levels())
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def test_levels_of_the_signed_map():
    levels = dynamic_map(True)
    assert levels.shape == (256,) and (levels.diff() > 0).all()
    expected = {0: -0.99296875, 127: 0.0, 128: 5.5e-7, 129: 3.25e-6, 130: 7.75e-6, 131: 2.125e-5}
    for index, level in (expected | {254: 0.99296875, 255: 1.0}).items():
        assert levels[index] == torch.tensor(level), index


def test_levels_of_the_map_without_signs():
    levels = dynamic_map(False)
    assert levels.shape == (256,) and (levels.diff() > 0).all()
    expected = {0: 0.0, 1: 3.25e-7, 2: 7.75e-7, 3: 2.125e-6, 4: 4.375e-6}
    for index, level in (expected | {254: 0.996484375, 255: 1.0}).items():
        assert levels[index] == torch.tensor(level), index


def draws(signed):
    """Numbers of every magnitude, the levels themselves and the middles between them."""
    levels = dynamic_map(signed)
    x = torch.cat(
        [
            torch.randn(100_000),
            torch.randn(100_000) * 10 ** torch.empty(100_000).uniform_(-9, 0),
            torch.linspace(-1, 1, 10_001),
            levels,
            (levels[1:] + levels[:-1]) / 2,
        ]
    )
    return x if signed else x.abs()


@LEVELS
@SIGNED
def test_codes_are_nearest(signed, level):
    x = draws(signed)
    with cpu_level(level):
        codes, absmax = quantize_blockwise(x, signed=signed)
    scaled = x.double() / absmax.double().repeat_interleave(256)[: len(x)]
    levels = dynamic_map(signed).double()
    best = (scaled[:, None] - levels).abs().min(1).values
    chosen = (scaled - levels[codes.long()]).abs()
    # Equally near within a few roundings of float32.
    assert (chosen <= best + 1e-6 * scaled.abs()).all()


@LEVELS
@SIGNED
def test_numbers_are_levels_times_absmax(signed, level):
    codes, absmax = torch.arange(256, dtype=torch.uint8), torch.tensor([3.0])
    expected = 3 * dynamic_map(signed)
    with cpu_level(level):
        x = dequantize_blockwise(codes, absmax, signed=signed)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)
    assert x[255] == 3 and x[127 if signed else 0] == 0


@LEVELS
@SIGNED
def test_coding_a_coded_block_changes_nothing(signed, level):
    codes, absmax = torch.arange(256, dtype=torch.uint8), torch.tensor([0.37])
    with cpu_level(level):
        again, same = quantize_blockwise(
            dequantize_blockwise(codes, absmax, signed=signed), signed=signed
        )
    assert torch.equal(again, codes) and torch.equal(same, absmax)


@SIGNED
def test_a_block_of_zeros_stays_zero(signed):
    codes, absmax = quantize_blockwise(torch.zeros(600), signed=signed)
    assert (codes == (127 if signed else 0)).all() and (absmax == 0).all()
    assert (dequantize_blockwise(codes, absmax, signed=signed) == 0).all()


@pytest.mark.parametrize("tiny", [1e-45, 1e-39, 1e-38])
def test_blocks_of_subnormal_numbers_stay_finite(tiny):
    codes, absmax = quantize_blockwise(torch.full((70,), tiny))
    assert (dequantize_blockwise(codes, absmax) <= tiny).all()


def test_not_a_number_spoils_its_block_only():
    x = torch.ones(512)
    x[3] = torch.nan
    codes, absmax = quantize_blockwise(x)
    decoded = dequantize_blockwise(codes, absmax)
    assert decoded[:256].isnan().all() and (decoded[256:] == 1).all()


@pytest.mark.parametrize(
    ("block_size", "error", "decibels"), [(256, 0.00854, 39.31), (2048, 0.00970, 38.09)]
)
def test_error_on_normal_numbers(block_size, error, decibels):
    x = torch.randn(1_000_000)
    codes, absmax = quantize_blockwise(x, block_size=block_size)
    difference = (dequantize_blockwise(codes, absmax, block_size=block_size) - x).double()
    assert float(difference.abs().mean()) == pytest.approx(error, rel=5e-3)
    ratio = x.double().square().sum() / difference.square().sum()
    assert float(10 * ratio.log10()) == pytest.approx(decibels, abs=0.05)
