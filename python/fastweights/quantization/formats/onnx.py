"""ONNX files: the nodes and initializers of a graph, read without the package that defines them.

The wire format of protocol buffers is small; what is read here are the fields of ModelProto,
GraphProto, NodeProto, AttributeProto and TensorProto that a quantized weight needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fastweights.quantization.formats.check import Bytes, broken, map_file
from fastweights.quantization.formats.matmul_nbits import MatMulNBits

__all__ = ["ONNX", "ONNXNode", "ONNXTensor", "quantized_layers", "read_onnx"]

_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
_MOST = 1 << 31
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1
_INPUTS = ("A", "B", "scales", "zero_points", "g_idx", "bias")


@dataclass(frozen=True, eq=False)
class ONNXTensor:
    """An initializer, its bytes not read yet.

    Args:
        name: in the graph.
        data_type: id of its type.
        shape: as in torch.
        data: its bytes, mapped from the file; None if it has them in another way than raw.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    data: Bytes | None

    def read(self) -> Tensor:
        """The tensor, a view of the file where its place allows one.

        Raises:
            ValueError: a type that is not read here, or sizes that do not match.
        """
        dtype = _DTYPES.get(self.data_type)
        if dtype is None or self.data is None:
            came = f"type {self.data_type}{'' if self.data is not None else ', not raw'}"
            raise _error(self.name, f"raw data of a type in {sorted(_DTYPES)}", came)
        size = prod(self.shape) * dtype.itemsize
        if self.data.nbytes != size:
            raise _error(self.name, f"{size} bytes for {list(self.shape)}", f"{self.data.nbytes}")
        aligned = self.data.ctypes.data % dtype.itemsize == 0
        data = torch.from_numpy(self.data if aligned else self.data.copy())
        return data.view(dtype).view(self.shape)


@dataclass(frozen=True)
class ONNXNode:
    """A node of the graph.

    Args:
        name: in the graph.
        op_type: such as "MatMulNBits".
        domain: such as "com.microsoft".
        inputs: names; "" for one that is left out.
        integers: its integer attributes.
    """

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    integers: dict[str, int]


@dataclass(frozen=True, eq=False)
class ONNX:
    """What is read of a file.

    Args:
        nodes: of the graph, not of graphs inside it.
        tensors: its initializers by name.
    """

    nodes: list[ONNXNode] = field(default_factory=list)
    tensors: dict[str, ONNXTensor] = field(default_factory=dict)


def read_onnx(path: str | Path) -> ONNX:
    """Reads the graph of a file and maps its initializers into memory.

    Args:
        path: the file; data outside it is looked for in its folder only.

    Raises:
        ValueError: the file cannot be read, is truncated or damaged.
    """
    source = Path(path)
    graphs = [
        v
        for n, v in _fields(map_file("onnx", source), "model")
        if n == 7 and not isinstance(v, int)
    ]
    if len(graphs) != 1:
        raise _error("model", "one graph", f"{len(graphs)}")
    file, external = ONNX(), _External(source.parent)
    for number, value in _fields(graphs[0], "graph"):
        if number == 1:
            file.nodes.append(_node(_bytes(value, "node")))
        elif number == 5:
            tensor = _tensor(_bytes(value, "initializer"), external)
            if tensor.name in file.tensors:
                raise _error(tensor.name, "one initializer of this name", "two")
            file.tensors[tensor.name] = tensor
    return file


def quantized_layers(file: ONNX) -> Iterator[tuple[str, MatMulNBits, dict[str, Tensor]]]:
    """Name, format and tensors of every MatMulNBits node, for `MatMulNBits.read`.

    Raises:
        ValueError: a node whose attributes or inputs are missing or make no sense.
    """
    for node in file.nodes:
        if node.op_type != "MatMulNBits" or node.domain != "com.microsoft":
            continue
        if len(node.inputs) > len(_INPUTS):
            raise _error(node.name, f"at most {len(_INPUTS)} inputs", f"{len(node.inputs)}")
        tensors = {}
        for name, key in zip(node.inputs[1:], _INPUTS[1:], strict=False):
            if name and name not in file.tensors:
                raise _error(f"{node.name}.{key}", "an initializer", f"{name!r:.80}")
            if name:
                tensors[key] = file.tensors[name].read()
        missing = [key for key in ("K", "N", "block_size") if key not in node.integers]
        if missing or "B" not in tensors or "scales" not in tensors:
            raise _error(node.name, "K, N, block_size, B and scales", "fewer")
        zero = tensors.get("zero_points")
        yield (
            node.name,
            MatMulNBits(
                in_features=node.integers["K"],
                out_features=node.integers["N"],
                bits=node.integers.get("bits", 4),
                block_size=node.integers["block_size"],
                zero_points=_kind(zero),
                flat=tensors["scales"].dim() == 1,
            ),
            tensors,
        )


def _kind(zero: Tensor | None) -> str | None:
    if zero is None:
        return None
    return "float" if zero.is_floating_point() else "packed"


class _External:
    """Data files beside a model, each mapped once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Bytes] = {}

    def take(self, name: str, entries: dict[str, str]) -> Bytes:
        location = entries.get("location", "")
        if Path(location).name != location or location in ("", "..") or not location.isprintable():
            raise _error(name, "data in the folder of the model", f"{location!r:.80}")
        if location not in self.files:
            self.files[location] = map_file("onnx", self.folder / location)
        whole = self.files[location]
        offset = _number(name, entries.get("offset", "0"))
        length = _number(name, entries.get("length", str(max(len(whole) - offset, 0))))
        if offset + length > len(whole):
            raise _error(
                name, f"{length} bytes at {offset} of {location:.80}", f"a file of {len(whole)}"
            )
        return whole[offset : offset + length]


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _error(name, "a number as offset and length", f"{text!r:.80}")
    return int(text)


def _node(raw: Bytes) -> ONNXNode:
    texts: dict[int, str] = {}
    inputs: list[str] = []
    integers: dict[str, int] = {}
    for number, value in _fields(raw, "node"):
        if number == 1:
            inputs.append(_text(value, "input"))
        elif number in (3, 4, 7):
            texts[number] = _text(value, "node")
        elif number == 5:
            name, integer = _attribute(_bytes(value, "attribute"))
            if integer is not None:
                integers[name] = integer
    return ONNXNode(texts.get(3, ""), texts.get(4, ""), texts.get(7, ""), tuple(inputs), integers)


def _attribute(raw: Bytes) -> tuple[str, int | None]:
    name, integer = "", None
    for number, value in _fields(raw, "attribute"):
        if number == 1:
            name = _text(value, "attribute")
        elif number == 3 and isinstance(value, int):
            integer = value
    return name, integer


def _tensor(raw: Bytes, external: _External) -> ONNXTensor:
    dims: list[int] = []
    name, kind, location = "", 0, 0
    data: Bytes | None = None
    entries: dict[str, str] = {}
    for number, value in _fields(raw, "initializer"):
        if number == 1:
            dims += [value] if isinstance(value, int) else _varints(value, "dims")
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = _text(value, "initializer")
        elif number == 9:
            data = _bytes(value, "raw_data")
        elif number == 13:
            entry = _fields(_bytes(value, "external_data"), "external_data")
            pair = {n: _text(v, "external_data") for n, v in entry}
            entries[pair.get(1, "")] = pair.get(2, "")
        elif number == 14 and isinstance(value, int):
            location = value
    if not all(0 <= size < _MOST for size in dims) or len(dims) > 8:
        raise _error(name, "up to 8 dimensions below 2^31", f"{dims!s:.80}")
    if location == _EXTERNAL:
        data = external.take(name, entries)
    return ONNXTensor(name, kind, tuple(dims), data)


def _fields(raw: Bytes, what: str) -> Iterator[tuple[int, int | Bytes]]:
    """Number and value of every field of a message: an integer, or bytes."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at, what)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(raw, at, what)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(raw, at, what)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise _error(what, "a field of a known wire type", f"{wire} at {at}")
        if not 0 <= size <= len(raw) - at:
            raise _error(what, f"{size} bytes at {at}", f"{len(raw) - at} to the end")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: Bytes, at: int, what: str) -> tuple[int, int]:
    """A signed 64-bit number and where the next thing begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            raise _error(what, "a number", "the end of the data")
        byte = int(raw[at])
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            value &= (1 << 64) - 1
            return value - (1 << 64 if value >> 63 else 0), at
    raise _error(what, "a number of at most 10 bytes", "a longer one")


def _varints(raw: Bytes, what: str) -> list[int]:
    """Packed numbers."""
    numbers: list[int] = []
    at = 0
    while at < len(raw) and len(numbers) < 16:
        number, at = _varint(raw, at, what)
        numbers.append(number)
    return numbers


def _bytes(value: int | Bytes, what: str) -> Bytes:
    if isinstance(value, int):
        raise _error(what, "bytes", "a number")
    return value


def _text(value: int | Bytes, what: str) -> str:
    raw = _bytes(value, what).tobytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _error(what, "UTF-8", f"{raw[:32]!r}") from error


def _error(name: str, rule: str, came: object) -> ValueError:
    return broken("onnx", name, rule, came)
