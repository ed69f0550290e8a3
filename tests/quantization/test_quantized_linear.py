"""What the specs do not say: bits independent of the batch, bad numbers, autograd details."""

import pytest
import torch

import fastweights as fw
from fastweights.ops.quantization import reference
from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.spec import KINDS
from fastweights.ops.quantization.tensor import packed_shape
from fastweights.testing import assert_close, assert_equal, available_cpu_levels, cpu_level

MODES = [(name, a) for name in KINDS for a in FORMATS[name].activations]


def weight(n, k, format="int4", group_size=None, activation="float"):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    return fw.quantize(w, format, group_size=group_size, activation=activation)


SMALL = [("int2", "float"), ("int4", "int8"), ("int6", "int8"), ("int8", "int8")]


@pytest.mark.parametrize(
    ("format", "activation", "group_size", "dtype"),
    [(*mode, None, torch.float32) for mode in MODES]
    + [(*mode, 16, torch.float32) for mode in SMALL]
    + [(name, "float", None, torch.bfloat16) for name in KINDS]
    + [("int8", "float", 16, torch.bfloat16)],
)
def test_a_row_is_the_same_bits_in_any_batch(format, activation, group_size, dtype):
    qt = weight(88, 200, format, group_size, activation)
    x = torch.randn(130, 200, dtype=dtype)
    for level in available_cpu_levels():
        with cpu_level(level):
            rows = torch.cat([fw.quantized_linear(x[m : m + 1], qt) for m in range(130)])
            for batch in range(1, 131):
                assert_equal(fw.quantized_linear(x[:batch], qt), rows[:batch], what=f"M={batch}")


def test_bits_do_not_depend_on_the_block_of_rows():
    qt = weight(150, 96, "nf4")
    x = torch.randn(600, 96, dtype=torch.bfloat16)
    y = fw.quantized_linear(x, qt)
    for begin, end in ((0, 257), (255, 600), (512, 513), (300, 317)):
        assert_equal(fw.quantized_linear(x[begin:end], qt), y[begin:end])


@pytest.mark.parametrize(("format", "activation"), MODES)
def test_large_products_split_over_threads(format, activation):
    qt = weight(600, 500, format, activation=activation)
    x = torch.randn(70, 500)
    assert_close(
        fw.quantized_linear(x, qt), reference.quantized_linear(x.double(), qt), tolerance=2e-5
    )
    dy = torch.randn(70, 600)
    got = torch.ops.fastweights.quantized_linear_backward(
        dy, qt.packed, format, 600, 500, qt.group_size
    )
    assert_close(got, dy.double() @ reference.dequantize(qt, torch.float64), tolerance=4e-6)


@pytest.mark.parametrize(
    ("n", "k", "m", "format", "group_size"),
    [
        (600, 500, 70, "nf4", 64),
        (37, 129, 1, "int4", 32),
        (528, 700, 300, "int3", 4096),
        (100, 300, 17, "q6_k", 16),
        (64, 160, 33, "int5", 160),
        (16, 48, 16, "int8_zp32", 16),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_all_shapes_of_tiles(n, k, m, format, group_size, dtype):
    qt = weight(n, k, format, group_size)
    dy = torch.randn(m, n, dtype=dtype)
    expected = dy.double() @ reference.dequantize(qt, torch.float64)
    for level in available_cpu_levels():
        with cpu_level(level):
            got = torch.ops.fastweights.quantized_linear_backward(
                dy, qt.packed, format, n, k, group_size
            )
            # Twice the rounding to bfloat16: of the weight, perhaps, and of the result.
            difference = (got.double() - expected).square().mean().sqrt()
            bound = 3e-3 if dtype == torch.bfloat16 else 1e-6
            assert difference < bound * expected.square().mean().sqrt()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("format", "activation"), MODES)
def test_a_bad_number_reaches_its_row_and_no_other(format, activation, bad):
    x = torch.randn(6, 100)
    x[3, 70] = bad
    qt = weight(20, 100, format, activation=activation)
    y = fw.quantized_linear(x, qt)
    assert not y[3].isfinite().any()
    keep = torch.arange(6) != 3
    assert_equal(y[keep], fw.quantized_linear(x[keep], qt))


def test_zeros_and_tiny_values_quantize_to_zeros():
    qt = weight(20, 100, activation="int8")
    for value in (0.0, 1e-40, -1e-38):
        assert_equal(fw.quantized_linear(torch.full((2, 100), value), qt), torch.zeros(2, 20))


def test_extreme_codes_do_not_saturate():
    # Codes 15 and activations 127 everywhere are the largest sums that int16 has to hold.
    w = torch.ones(16, 64)
    w[:, 0] = 0
    for format in ("int4", "int8"):
        qt = fw.quantize(w, format, group_size=32, activation="int8")
        for sign in (1.0, -1.0):
            x = torch.full((5, 64), sign)
            expected = reference.quantized_linear(x.double(), qt)
            assert_close(fw.quantized_linear(x, qt), expected, tolerance=1e-6)


def test_the_code_of_no_opposite_is_exact():
    # -128 is not written here, but files of GPTQ and Q8_0 hold it.
    codes = torch.full((16, 2, 32), -128).to(torch.uint8)
    codes[3, :, ::2] = 127
    scale = torch.ones(16, 2, 1)
    qt = reference.pack(codes, scale, None, "int8_sym", (16, 64), "int8")
    x = torch.tensor([[127.0], [-127.0]]).repeat(3, 64)
    x[:, 5::2] *= -1
    expected = reference.quantized_linear(x.double(), qt)
    for level in available_cpu_levels():
        with cpu_level(level):
            for rows in (1, 6):
                assert_close(fw.quantized_linear(x[:rows], qt), expected[:rows], tolerance=1e-6)


def test_only_the_packed_weight_is_saved():
    qt = weight(48, 100)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fw.quantized_linear(torch.randn(3, 100, requires_grad=True), qt).sum().backward()
    assert [t.data_ptr() for t in saved] == [qt.packed.data_ptr()]


def test_the_mode_does_not_depend_on_grad_mode():
    for activation in ("float", "int8"):
        qt = weight(48, 100, activation=activation)
        x = torch.randn(3, 100)
        with torch.no_grad():
            expected = fw.quantized_linear(x, qt)
        assert_equal(fw.quantized_linear(x.requires_grad_(), qt).detach(), expected)


def test_bias_of_another_dtype_and_float64_with_int8():
    qt = weight(20, 70, activation="int8")
    x, bias = torch.randn(4, 70, dtype=torch.bfloat16), torch.randn(20, dtype=torch.float64)
    y = fw.quantized_linear(x, qt, bias)
    assert y.dtype == torch.bfloat16
    assert_close(y, reference.quantized_linear(x.float(), qt, bias), tolerance=5e-3)
    wide = fw.quantized_linear(x.double(), qt, bias)
    assert wide.dtype == torch.float64
    assert_close(wide, reference.quantized_linear(x.double(), qt, bias), tolerance=1e-6)


def test_autocast_casts_the_input_only():
    qt = weight(20, 70)
    x = torch.randn(4, 70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fw.quantized_linear(x, qt, torch.zeros(20))
    assert_equal(y, fw.quantized_linear(x.bfloat16(), qt, torch.zeros(20)))


def test_qt_is_a_pytree():
    qt = weight(40, 100, "int8", 32, "int8")
    leaves, structure = torch.utils._pytree.tree_flatten(qt)
    assert len(leaves) == 1 and torch.utils._pytree.tree_unflatten(leaves, structure) == qt
    assert qt.packed.shape == packed_shape("int8", 40, 100, 32)


def test_a_vector_with_a_bias_that_is_trained():
    w, bias = torch.randn(5, 32), torch.zeros(5, requires_grad=True)
    fw.quantized_linear(torch.randn(32), fw.quantize(w, "int8"), bias).sum().backward()
    assert torch.equal(bias.grad, torch.ones(5))
