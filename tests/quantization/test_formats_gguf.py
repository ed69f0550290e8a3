"""GGUF files against the package that defines them, and tensor types against the sheet's bytes."""

import struct

import gguf
import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.demo.model import smollm2
from fastweights.ops.quantization.layout import unpack
from fastweights.quantization.formats import GGUF, GGUFTensor, GGUFValue, read_gguf, write_gguf
from fastweights.quantization.formats.gguf_blocks import FLOATS, TYPES

PACKED = [t.name for t in TYPES.values() if t.blocks is not None]


HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}


def columns(type_name):
    return 96 if gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0] == 32 else 512


def random_blocks(type_name, n=48, k=None, seed=0):
    """Random bytes, but for scales and minima, which are finite."""
    kind = gguf.GGMLQuantizationType[type_name]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    k = columns(type_name) if k is None else k
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (n, k // weights, size), dtype=np.uint8)
    for offset in HALVES.get(type_name, (0,)):
        values = rng.normal(0, 0.01, (n, k // weights, 1)).astype(np.float16)
        data[..., offset : offset + 2] = values.view(np.uint8)
    if type_name == "MXFP4":
        data[..., 0] = 16 + data[..., 0] % 224  # no denormals, nothing infinite
    return kind, data.reshape(n, -1)


def tensor_of(type_name, data, n=48, k=None):
    k = columns(type_name) if k is None else k
    kind = next(i for i, t in TYPES.items() if t.name == type_name)
    return GGUFTensor("w", kind, (n, k), data)


@pytest.mark.parametrize("type_name", PACKED)
@pytest.mark.parametrize("n", [48, 5])
@pytest.mark.parametrize("blocks", [1, 3])
def test_values_are_those_of_the_package(type_name, n, blocks):
    shape = (n, blocks * columns(type_name) // (3 if columns(type_name) == 96 else 2))
    kind, data = random_blocks(type_name, *shape)
    weight = tensor_of(type_name, data, *shape).read()
    expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
    assert torch.equal(fw.dequantize(weight), expected)
    again = GGUFTensor.of("w", weight, type_name)
    assert np.array_equal(again.data, data)
    assert (again.type, again.shape) == (kind, shape)


def test_sizes_are_those_of_the_package():
    for kind, type_ in TYPES.items():
        known = gguf.GGMLQuantizationType(kind)
        assert known.name == type_.name
        assert gguf.GGML_QUANT_SIZES[known] == (type_.weights, type_.bytes)


def test_the_sheets_bytes():
    data = bytes.fromhex("0040 80919 1a2a2b3b3c4c4d5d5e6e6f7f7f8".replace(" ", ""))
    weight = tensor_of("Q4_0", np.frombuffer(data, np.uint8).reshape(1, 18).copy(), 1, 32).read()
    assert fw.dequantize(weight)[0].tolist() == [
        float(min(2 * int((x / 2) + 8.5), 30) - 16) for x in range(-16, 16)
    ]


def test_rows_in_another_order():
    _, data = random_blocks("Q4_1")
    rows = torch.randperm(48)
    tensor = tensor_of("Q4_1", data)
    assert torch.equal(fw.dequantize(tensor.read(rows=rows)), fw.dequantize(tensor.read())[rows])
    floats = GGUFTensor.of("w", torch.randn(48, 8), "F32")
    assert torch.equal(floats.read(rows=rows), floats.read()[rows])


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_floats(dtype, shape):
    values = torch.randn(shape, dtype=dtype)
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert torch.equal(GGUFTensor.of("w", values, name).read(), values)


def test_what_we_quantize_is_written_where_it_fits():
    w = torch.randn(48, 128)
    for group in (32, 64):
        weight = fw.quantize(w, "int4", group_size=group)
        again = GGUFTensor.of("w", weight, "Q4_1").read()
        assert torch.equal(fw.dequantize(again), fw.dequantize(weight))
    with pytest.raises(ValueError, match="gguf: w: expected int4_sym with inputs in multiples of"):
        GGUFTensor.of("w", weight, "Q4_0")
    with pytest.raises(ValueError, match="gguf: w: expected int4 with inputs in multiples of 32"):
        GGUFTensor.of("w", fw.quantize(torch.randn(4, 33), "int4"), "Q4_1")
    with pytest.raises(ValueError, match="gguf: w: expected q4_k with inputs in multiples of 256"):
        GGUFTensor.of("w", fw.quantize(w, "q4_k"), "Q4_K")
    five = tensor_of("Q5_1", random_blocks("Q5_1")[1]).read()
    with pytest.raises(ValueError, match="expected a weight that Q5_0 holds, got other minima"):
        GGUFTensor.of("w", five, "Q5_0")
    for thing, type_name in ((w, "F16"), (w, "Q4_1"), (weight, "F32"), (weight, "Q2_K")):
        with pytest.raises(ValueError, match=f"gguf: w: expected a tensor that is {type_name}"):
            GGUFTensor.of("w", thing, type_name)


@pytest.mark.parametrize("type_name", PACKED)
def test_our_weights_as_the_package_reads_them(type_name):
    """Quantized by us, written, dequantized by the package."""
    blocks = next(t.blocks for t in TYPES.values() if t.name == type_name)
    weight = fw.quantize(torch.randn(20, 512), blocks.format, group_size=blocks.group_size)
    if type_name == "Q5_0":
        weight = tensor_of("Q5_0", random_blocks("Q5_0", 20, 512)[1], 20, 512).read()
    tensor = GGUFTensor.of("w", weight, type_name)
    theirs = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[type_name])
    assert torch.equal(fw.dequantize(weight), torch.from_numpy(theirs))


def test_minus_128_meets_both_kinds_of_activations():
    _, data = random_blocks("Q8_0")
    data[:, 2:34] = 128
    weight = tensor_of("Q8_0", data).read(activation="int8")
    assert unpack(weight)[0][0, 0, 0] == 128
    x = torch.full((1, 96), -3.0)
    torch.testing.assert_close(fw.quantized_linear(x, weight), x @ fw.dequantize(weight).T)


def write_by_package(path):
    """A file of the package with every type of metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7 if kind[0] == "u" else -7)
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "é 字")
    writer.add_array("a.strings", ["x", "", "字"])
    writer.add_array("a.floats", [1.5, -2.0])
    writer.add_array("a.bools", [True, False])
    writer.add_array("a.integers", [1, -2, 3])
    writer.add_custom_alignment(64)
    for type_name in PACKED:
        kind, data = random_blocks(type_name)
        writer.add_tensor(type_name, data, raw_dtype=kind)
    writer.add_tensor("norm", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_files_of_the_package(tmp_path):
    path = tmp_path / "a.gguf"
    write_by_package(path)
    file = read_gguf(path)
    reader = gguf.GGUFReader(path)
    for name, value in file.metadata.items():
        contents = reader.fields[name].contents()
        assert value.value == contents, name
    assert [t.name for t in reader.tensors] == list(file.tensors)
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.type_name == theirs.tensor_type.name
        assert np.array_equal(ours.data.ravel(), theirs.data.view(np.uint8).ravel())
    write_gguf(tmp_path / "b.gguf", file)
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


def test_the_model_of_the_demo_is_written_again_to_the_byte(tmp_path):
    source = smollm2()
    file = read_gguf(source)
    tensors = {}
    for name, tensor in file.tensors.items():
        tensors[name] = GGUFTensor.of(name, tensor.read(), tensor.type_name)
    write_gguf(tmp_path / "again.gguf", GGUF(file.metadata, tensors, file.version))
    assert (tmp_path / "again.gguf").read_bytes() == source.read_bytes()


def pieces(metadata=b"", values=0, tensors=b"", count=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, count, values) + metadata + tensors


def text(s):
    raw = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(raw)) + raw


def head(name=b"w", dims=(32, 2), kind=3, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def value(key, kind, raw):
    return text(key) + struct.pack("<I", kind) + raw


BIG = 2**62
BAD = {
    "empty": (b"", "cannot be read"),
    "magic": (pieces(magic=b"GGML"), "magic: expected b'GGUF', got b'GGML'"),
    "cut": (pieces()[:10], "tensor count: expected 8 bytes at 8, got 2 to the end"),
    "version 1": (pieces(version=1), r"version: expected one of \(2, 3\), little-endian, got 1"),
    "big-endian": (pieces(version=3 << 24), "version: expected one of"),
    "tensors": (pieces(count=BIG), "tensor count: expected a count that fits into the file"),
    "values": (pieces(values=BIG), "metadata count: expected a count that fits into the file"),
    "key length": (pieces(struct.pack("<Q", BIG), 1), "metadata count: expected a count"),
    "string length": (
        pieces(value("k", 8, struct.pack("<Q", BIG)), 1), "k: expected a count that fits"
    ),
    "key": (pieces(value(b"\xff\xfe", 4, bytes(4)), 1), "metadata key: expected UTF-8"),
    "string": (pieces(value("k", 8, text(b"\xc3")), 1), r"k: expected UTF-8, got b'\\xc3'"),
    "bool": (pieces(value("k", 7, b"\2"), 1), "k: expected 0 or 1 as bool, got 2"),
    "type": (pieces(value("k", 99, bytes(8)), 1), "k: expected a type of metadata, got 99"),
    "nested": (
        pieces(value("k", 9, struct.pack("<IQ", 9, 1)), 1), "k: expected a type of array elements"
    ),
    "array": (
        pieces(value("k", 9, struct.pack("<IQ", 4, BIG)), 1), "k: expected a count that fits"
    ),
    "strings": (
        pieces(value("k", 9, struct.pack("<IQ", 8, BIG)), 1), "k: expected a count that fits"
    ),
    "twice": (pieces(value("k", 4, bytes(4)) * 2, 2), "k: expected one value, got two"),
    "alignment": (
        pieces(value("general.alignment", 4, struct.pack("<I", 24)), 1),
        "general.alignment: expected uint32, a power of two",
    ),
    "alignment type": (
        pieces(value("general.alignment", 8, text("x")), 1), "general.alignment: expected uint32"
    ),
    "dimensions": (pieces(tensors=head(dims=(1,) * 5), count=1), "w: expected 1 to 4 dimensions"),
    "scalar": (pieces(tensors=head(dims=()), count=1), "w: expected 1 to 4 dimensions, got 0"),
    "overflow": (
        pieces(tensors=head(dims=(2**33, 2**33)), count=1), r"w: expected dimensions below 2\^31"
    ),
    "no rows": (pieces(tensors=head(dims=(32, 0)), count=1), "w: expected dimensions below"),
    "rows": (
        pieces(tensors=head(dims=(31, 2)), count=1), "w: expected rows in multiples of 32 for Q4_1"
    ),
    "tensor type": (
        pieces(tensors=head(kind=1000), count=1), "w: expected a known tensor type, got 1000"
    ),
    "size": (
        pieces(tensors=head(dims=(2**30, 2**30)), count=1), r"w: expected \d{18} bytes at 96, got"
    ),
    "offset": (
        pieces(tensors=head(offset=2**63), count=1), "w: expected 40 bytes at 9223372036854775904"
    ),
    "unaligned": (
        pieces(tensors=head(offset=8), count=1), "w: expected an offset in multiples of 32, got 8"
    ),
    "names": (
        pieces(tensors=head() * 2, count=2) + bytes(80), "w: expected one tensor of this name"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_damaged_files(kind, tmp_path):
    content, message = BAD[kind]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="gguf: .*" + message):
        read_gguf(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"gguf: .* cannot be read: No such file"):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (tensor_of("Q4_1", np.full((48, 60), 255, np.uint8)), "w: expected finite scales and min"),
        (GGUFTensor("w", 0, (2,), np.full((1, 8), 255, np.uint8)), "w: expected finite values"),
        (GGUFTensor("w", 10, (1, 256), np.zeros((1, 84), np.uint8)), r"read here .* got Q2_K"),
        (GGUFTensor("w", 3, (2, 1, 32), np.zeros((2, 20), np.uint8)), "w: expected two dimensions"),
    ],
)
def test_tensors_that_are_not_read(tensor, message):
    with pytest.raises(ValueError, match="gguf: .*" + message):
        tensor.read()


@pytest.mark.parametrize(("type_name", "bytes"), [("Q5_0", (0x40, 0x75)), ("MXFP4", (253, 0))])
def test_weights_that_would_be_infinite(type_name, bytes):
    _, data = random_blocks(type_name)
    data[0, :2] = bytes
    with pytest.raises(ValueError, match="gguf: w: expected finite scales and minima"):
        tensor_of(type_name, data).read()


def test_a_file_is_written_over_itself(tmp_path):
    path = tmp_path / "a.gguf"
    write_by_package(path)
    whole, file = path.read_bytes(), read_gguf(path)
    write_gguf(path, file)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (1, 1, 1, 1, 2)])
def test_floats_that_have_no_place(shape):
    with pytest.raises(ValueError, match="gguf: w: expected 1 to 4 dimensions, none of them 0"):
        GGUFTensor.of("w", torch.zeros(shape), "F32")


@pytest.mark.parametrize(
    "value",
    [(0, 300), (4, "x"), (4, [1, "x"]), (8, 3), (8, "\ud800"), (9, [1]), (99, 1)],
    ids=str,
)
def test_metadata_of_another_type(value, tmp_path):
    file = GGUF({"key": GGUFValue(*value)}, {})
    with pytest.raises(ValueError, match=f"gguf: key: expected a value, .* of type {value[0]}, go"):
        write_gguf(tmp_path / "a.gguf", file)
    assert not list(tmp_path.iterdir())


def test_metadata_keeps_its_types(tmp_path):
    metadata = {"a": GGUFValue(0, 3), "b": GGUFValue(8, ["x"]), "c": GGUFValue(12, 0.1)}
    write_gguf(tmp_path / "a.gguf", GGUF(metadata, {}, 2))
    again = read_gguf(tmp_path / "a.gguf")
    assert again.metadata == metadata
    assert again.version == 2
