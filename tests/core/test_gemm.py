"""The register tile of core/gemm.h against float64, at every CPU level."""

import numpy as np
import pytest

from fastweights._load import _C
from fastweights.testing import available_cpu_levels, cpu_level

SHAPES = [
    (m, n, k) for m in (1, 2, 5, 6, 7, 12, 13) for n in (16, 48, 80, 96) for k in (0, 1, 7, 64)
]
every_level = pytest.mark.parametrize("level", available_cpu_levels())


@every_level
def test_product(level):
    rng = np.random.default_rng(0)
    for m, n, k in [*SHAPES, (128, 128, 128)]:
        a = rng.normal(size=(m, k)).astype(np.float32)
        b = rng.normal(size=(k, n)).astype(np.float32)
        with cpu_level(level):
            got = _C.gemm(a, b)
        bound = np.abs(a).astype(np.float64) @ np.abs(b) * (k + 1) * 2.0**-24
        assert np.all(np.abs(got - a.astype(np.float64) @ b) <= bound), (m, n, k)


def bfloat16_pairs(x):
    """Float32 [rows, 2 n] rounded toward zero to bfloat16: its values, and its bits in pairs."""
    bits = x.view(np.uint32) & np.uint32(0xFFFF0000)
    pairs = (bits[:, 0::2] >> 16) | bits[:, 1::2]
    return bits.view(np.float32), np.ascontiguousarray(pairs)


@every_level
def test_bfloat16_product(level):
    rng = np.random.default_rng(1)
    for m, n, half_k in [(m, n, k) for m, n, k in SHAPES if k]:
        a, a_pairs = bfloat16_pairs(rng.normal(size=(m, 2 * half_k)).astype(np.float32))
        b, b_pairs = bfloat16_pairs(rng.normal(size=(n, 2 * half_k)).astype(np.float32))
        with cpu_level(level):
            got = _C.gemm_bf16(a_pairs, np.ascontiguousarray(b_pairs.T))
        exact = a.astype(np.float64) @ b.T
        bound = np.abs(a).astype(np.float64) @ np.abs(b).T * (2 * half_k + 1) * 2.0**-23
        assert np.all(np.abs(got - exact) <= bound), (m, n, half_k)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: _C.gemm(np.ones((2, 3), np.float32), np.ones((4, 16), np.float32)),
            "gemm: expected",
        ),
        (
            lambda: _C.gemm(np.ones((2, 4), np.float32), np.ones((4, 15), np.float32)),
            "gemm: expected",
        ),
        (lambda: _C.vmath("sin", np.ones(2, np.float32)), "vmath: expected exp, log"),
        (lambda: _C.vmath("exp", np.ones(2, np.int32)), "vmath: expected x of dtype"),
        (lambda: _C.convert("int8", np.ones(2, np.float32)), "convert: expected bfloat16"),
        (lambda: _C.peak_flops(rounds=0), "peak_flops: expected rounds"),
        (lambda: _C.gemm_flops(N=5), "gemm_flops: expected"),
        (
            lambda: _C.stream_seconds("read", np.ones(4, np.float32), np.ones(4, np.float32), 0, 5),
            "stream_seconds: expected",
        ),
    ],
)
def test_bad_arguments_of_the_module(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
