"""MatMulNBits weights against their definition written out, and the files that they lie in."""

import pytest
import torch

import onnx_files
from checkpoint_layers import check_values, gptq, onnx, same
from fastweights.quantization.formats import GPTQ, MatMulNBits
from fastweights.quantization.formats.onnx import quantized_layers, read_onnx


def definition(tensors, n, k, bits, block):
    """W[n, k] = scales[n, g] * (code[n, k] - zero_points[n, g]) in float64, code by code."""
    blocks = -(-k // block)

    def code(row, i):
        place = i * bits
        return int(row[place // 8]) >> (place % 8) & (1 << bits) - 1

    scales = tensors["scales"].double().view(n, blocks)
    zeros = torch.full((n, blocks), 1 << (bits - 1)).double()
    if "zero_points" in tensors:
        stored = tensors["zero_points"].view(n, -1)
        zeros = stored.double()
        if not stored.is_floating_point():
            zeros = torch.tensor([[code(row, g) for g in range(blocks)] for row in stored])
    rows = tensors["B"].view(n, -1)
    codes = torch.tensor([[code(row, i) for i in range(k)] for row in rows])
    groups = torch.arange(k) // block
    if "g_idx" in tensors:
        groups = tensors["g_idx"].long()
    return scales[:, groups] * (codes - zeros[:, groups]), scales[:, groups].abs()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_points", [None, "packed", "float"])
@pytest.mark.parametrize("flat", [False, True])
def test_against_the_definition(bits, zero_points, flat):
    tensors = onnx(bits=bits, zero_points=zero_points, flat=flat)
    form = MatMulNBits(100, 24, bits, 32, zero_points, flat)
    layer = form.read(tensors)
    check_values(layer, *definition(tensors, 24, 100, bits, 32), bits)
    same(form.write(layer), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_blocks_and_scales(dtype, block):
    tensors = onnx(block=block, dtype=dtype, zero_points="packed")
    form = MatMulNBits(100, 24, 4, block, "packed")
    layer = form.read(tensors)
    check_values(layer, *definition(tensors, 24, 100, 4, block), 4)
    same(form.write(layer), tensors)


def test_act_order_from_gptq():
    layer = GPTQ(4, 32).read(gptq(act_order=True))
    form = MatMulNBits(128, 64, 4, 32, "packed")
    tensors = form.write(layer)
    check_values(form.read(tensors), *definition(tensors, 64, 128, 4, 32), 4)
    assert torch.equal(form.read(tensors).dequantize(), layer.dequantize())
    same(GPTQ(4, 32).write(form.read(tensors)), gptq(act_order=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": None}, r"layer\.B: expected \[N, blocks, bytes per block\], got none"),
        ({"B": torch.zeros(24, 4, 15).byte()}, r"B: expected uint8 .* = \[24, 4, 16\], got uint8"),
        ({"scales": torch.zeros(24, 3)}, r"scales: expected .* = \[24, 4\], got float32 \[24, 3\]"),
        ({"scales": torch.full((24, 4), torch.inf)}, r"scales: expected finite values"),
        ({"zero_points": torch.zeros(24, 2).byte()}, r"zero_points: expected no tensor of this"),
        ({"g_idx": torch.zeros(100).int()}, r"g_idx: expected 32 inputs in every group, got 100"),
        ({"bias": torch.zeros(25)}, r"bias: expected .* \[N\] = \[24\], got float32 \[25\]"),
    ],
)
def test_bad_tensors(change, message):
    tensors = {k: v for k, v in (onnx() | change).items() if v is not None}
    with pytest.raises(ValueError, match="onnx: .*" + message):
        MatMulNBits(100, 24).read(tensors, "layer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, 24), r"K: expected 1 to 2\^31 - 1, got 0"),
        ((100, 2**40), "N: expected 1 to"),
        ((100, 24, 3), "bits: expected 2, 4 or 8, got 3"),
        ((100, 24, 4, 48), "block_size: expected a power of two, got 48"),
        ((100, 24, 4, 8), "group_size: expected -1, a multiple of 32, or 16, up to 65536"),
        ((100, 24, 4, 32, "integer"), "zero_points: expected None, packed or float"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match="onnx: " + message):
        MatMulNBits(*settings)


def test_what_it_cannot_hold():
    layer = GPTQ(4, 32).read(gptq())
    with pytest.raises(ValueError, match=r"onnx: expected a weight \[24, 128\], got \[64, 128\]"):
        MatMulNBits(128, 24).write(layer)
    with pytest.raises(ValueError, match="onnx: expected a symmetric weight"):
        MatMulNBits(128, 64).write(layer)
    tensors = onnx(zero_points="float")
    half = MatMulNBits(100, 24, zero_points="float").read(tensors)
    with pytest.raises(ValueError, match="expected integer zero points from 0 to 15"):
        MatMulNBits(100, 24, zero_points="packed").write(half)


def write(path, *, external=False, **changes):
    """A file of two layers and a vector; with `external` that lies in weights.bin."""
    nodes, initializers = [], []
    for i, zero_points in enumerate((None, "packed")):
        form = MatMulNBits(100, 24, 4, 32, zero_points)
        made, tensors = onnx_files.matmul_nbits(f"layer.{i}", form, onnx(zero_points=zero_points))
        nodes.append(made)
        initializers += tensors
    place = ("weights.bin", 4, 20) if external else None
    (path.parent / "weights.bin").write_bytes(bytes(4) + onnx_files.raw_bytes(torch.arange(5.0)))
    initializers.append(onnx_files.tensor("norm", torch.arange(5.0), changes.get("place", place)))
    path.write_bytes(onnx_files.model(nodes, initializers))


@pytest.mark.parametrize("external", [False, True])
def test_files(external, tmp_path):
    path = tmp_path / "a.onnx"
    write(path, external=external)
    file = read_onnx(path)
    assert file.tensors["norm"].read().tolist() == [0, 1, 2, 3, 4]
    layers = list(quantized_layers(file))
    assert [name for name, _, _ in layers] == ["layer.0", "layer.1"]
    for (_, form, tensors), zero_points in zip(layers, (None, "packed"), strict=True):
        assert form == MatMulNBits(100, 24, 4, 32, zero_points)
        same(form.write(form.read(tensors)), onnx(zero_points=zero_points))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("../weights.bin", 0, 4), "expected data in the folder of the model"),
        (("/etc/passwd", 0, 4), "expected data in the folder of the model"),
        (("", 0, 4), "expected data in the folder of the model"),
        (("..", 0, 4), "expected data in the folder of the model"),
        ((".", 0, 4), "expected data in the folder of the model"),
        (("a\nb", 0, 4), r"expected data in the folder of the model, got 'a\\nb'"),
        (("none.bin", 0, 4), "cannot be read: No such file"),
        (("weights.bin", 8, 20), "norm: expected 20 bytes at 8 of weights.bin, got a file of 24"),
        (("weights.bin", -4, 20), "norm: expected a number as offset and length, got '-4'"),
        (("weights.bin", 10**30, 20), "norm: expected a number as offset and length"),
        (("weights.bin", 4, 16), "norm: expected 20 bytes for .*, got 16"),
    ],
)
def test_data_outside_the_file(place, message, tmp_path):
    path = tmp_path / "a.onnx"
    write(path, place=place)
    with pytest.raises(ValueError, match="onnx: .*" + message):
        read_onnx(path).tensors["norm"].read()


@pytest.mark.parametrize(
    ("kind", "field", "message"),
    [
        (1, 4, "w: expected raw data of a type in .*, got type 1, not raw"),
        (8, 9, "w: expected .* got type 8$"),
    ],
)
def test_data_of_another_kind(kind, field, message, tmp_path):
    number, text = onnx_files.number, onnx_files.text
    tensor = number(1, 2) + number(2, kind) + text(8, "w") + text(field, bytes(8))
    (tmp_path / "a.onnx").write_bytes(onnx_files.model([], [tensor]))
    with pytest.raises(ValueError, match="onnx: " + message):
        read_onnx(tmp_path / "a.onnx").tensors["w"].read()


def damaged(*parts):
    return onnx_files.number(1, 8) + b"".join(parts)


graph = onnx_files.text(7, b"")
BAD_FILES = {
    "empty": (b"", "cannot be read"),
    "no graph": (damaged(), "model: expected one graph, got 0"),
    "two graphs": (damaged(graph, graph), "model: expected one graph, got 2"),
    "cut number": (b"\x80", "model: expected a number, got the end of the data"),
    "long number": (b"\x80" * 11, "model: expected a number of at most 10 bytes"),
    "cut bytes": (damaged(b"\x3a\x7f"), "model: expected 127 bytes at 4, got 0 to the end"),
    "negative": (damaged(b"\x3a" + b"\xff" * 9 + b"\x01"), "model: expected -1 bytes"),
    "group": (damaged(b"\x3b"), "model: expected a field of a known wire type, got 3"),
    "node": (
        damaged(onnx_files.text(7, onnx_files.number(1, 5))), "node: expected bytes, got a number"
    ),
    "name": (
        damaged(onnx_files.text(7, onnx_files.text(5, onnx_files.text(8, b"\xff")))),
        "initializer: expected UTF-8",
    ),
    "dims": (
        damaged(onnx_files.text(7, onnx_files.text(5, onnx_files.number(1, 2**40)))),
        "expected up to 8 dimensions below",
    ),
    "twice": (
        damaged(onnx_files.text(7, onnx_files.text(5, onnx_files.text(8, "w")) * 2)),
        "w: expected one initializer of this name, got two",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_damaged_files(kind, tmp_path):
    content, message = BAD_FILES[kind]
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ValueError, match="onnx: .*" + message):
        read_onnx(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": None}, "w: expected K, N, block_size, B and scales, got fewer"),
        ({"inputs": ["x", "B"]}, "w: expected K, N, block_size, B and scales, got fewer"),
        ({"inputs": ["x", "B", "none"]}, r"w\.scales: expected an initializer, got 'none'"),
        ({"inputs": ["x"] * 7}, "w: expected at most 6 inputs, got 7"),
        ({"bits": 5}, "bits: expected 2, 4 or 8, got 5"),
    ],
)
def test_bad_nodes(change, message, tmp_path):
    settings = {"K": 100, "N": 24, "bits": 4, "block_size": 32} | change
    inputs = settings.pop("inputs", ["x", "B", "scales"])
    integers = {k: v for k, v in settings.items() if v is not None}
    node = onnx_files.node("w", "MatMulNBits", inputs, "com.microsoft", **integers)
    tensors = [onnx_files.tensor(k, v) for k, v in onnx().items()]
    (tmp_path / "a.onnx").write_bytes(onnx_files.model([node], tensors))
    with pytest.raises(ValueError, match="onnx: " + message):
        list(quantized_layers(read_onnx(tmp_path / "a.onnx")))
