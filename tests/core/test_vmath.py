"""core/vmath.h against float64 at every CPU level; the bounds are those in the header's comment."""

import numpy as np
import pytest
import torch

from fastweights._load import _C
from fastweights.testing import available_cpu_levels, cpu_level

ULP = {"exp": 1.5, "log": 2.0, "sigmoid": 3.0, "softplus": 3.0, "tanh": 3.0}
# softplus in float64 needs log1p of what underflows in float32; tanh and sigmoid are library-exact.
EXACT = {
    "exp": np.exp,
    "log": np.log,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    "tanh": np.tanh,
}
every_level = pytest.mark.parametrize("level", available_cpu_levels())


def inputs(function):
    """Every magnitude of float32 and, densely, the range where the function is not trivial."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    anywhere = bits.view(np.float32)
    dense = rng.uniform(-110, 95, 400_000).astype(np.float32)
    near = rng.normal(0, 1, 200_000).astype(np.float32)
    x = np.concatenate([anywhere[np.isfinite(anywhere)], dense, near])
    return np.abs(x) if function == "log" else x


def ulp_error(got, exact):
    """|got - exact| in units of the spacing of float32 at exact, subnormal results included."""
    largest = float(np.finfo(np.float32).max)
    inside = np.abs(exact) <= largest
    spacing = np.spacing(np.abs(exact[inside]).astype(np.float32)).astype(np.float64)
    assert np.all(np.isinf(got[~inside]) | (np.abs(got[~inside]) == largest))
    return np.abs(got[inside].astype(np.float64) - exact[inside]) / spacing


@every_level
@pytest.mark.parametrize("function", ULP)
def test_float32_error(function, level):
    x = inputs(function)
    with np.errstate(over="ignore", divide="ignore", under="ignore"), cpu_level(level):
        error = ulp_error(_C.vmath(function, x), EXACT[function](x.astype(np.float64)))
    assert error.max() <= ULP[function], f"at {x[error.argmax()]!r}"


@every_level
@pytest.mark.parametrize("function", ULP)
def test_float64_error(function, level):
    x = np.random.default_rng(1).normal(0, 3, 10_001)
    x = np.abs(x) if function == "log" else x
    with cpu_level(level):
        np.testing.assert_allclose(_C.vmath(function, x), EXACT[function](x), rtol=4e-15)


@every_level
@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        ("exp", [-np.inf, np.inf, np.nan, 0.0], [0.0, np.inf, np.nan, 1.0]),
        ("log", [0.0, np.inf, -1.0, np.nan, 1.0], [-np.inf, np.inf, np.nan, np.nan, 0.0]),
        ("sigmoid", [-np.inf, np.inf, np.nan, 0.0], [0.0, 1.0, np.nan, 0.5]),
        ("softplus", [-np.inf, np.inf, np.nan], [0.0, np.inf, np.nan]),
        ("tanh", [-np.inf, np.inf, np.nan, 0.0], [-1.0, 1.0, np.nan, 0.0]),
    ],
)
def test_special_values(function, x, expected, level):
    with cpu_level(level):
        got = _C.vmath(function, np.array(x, np.float32))
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


@every_level
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_every_half_widens_exactly(half, level):
    bits = np.arange(2**16, dtype=np.uint16)
    with cpu_level(level):
        got = _C.convert(half, bits)
    if half == "float16":
        expected = bits.view(np.float16).astype(np.float32)
    else:
        expected = (bits.astype(np.uint32) << 16).view(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@every_level
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_narrowing_rounds_to_nearest_even(half, level):
    rng = np.random.default_rng(2)
    halves = np.arange(2**16, dtype=np.uint16)
    x = rng.integers(0, 2**32, 300_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    with cpu_level(level):
        exact = _C.convert(half, halves)
        # every half, its neighbours in float32 and every tie between two halves
        around = exact.view(np.uint32)[:, None] + np.array([0, 1, 0x8000, 0x7FFF, 0x1000, 0x0FFF])
        x = np.concatenate([x, around.astype(np.uint32).view(np.float32).ravel()])
        got = _C.convert(half, x)
    expected = torch.from_numpy(x).to(getattr(torch, half)).view(torch.uint16).numpy()
    nan = np.isnan(x)
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    with cpu_level(level):
        assert np.isnan(_C.convert(half, got[nan])).all()
