"""GGUF, the files of llama.cpp: container, metadata and tensors."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.layout import unpack_codes, unpack_stored
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.quantization.formats.check import Bytes, broken, map_file
from fastweights.quantization.formats.gguf_blocks import FLOATS, TYPES, Blocks, TensorType
from fastweights.quantization.formats.rows import pack_rows, row_parts, rows_of

__all__ = ["GGUF", "GGUFTensor", "GGUFValue", "read_gguf", "write_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST = 1 << 31  # of any dimension
_MOST_DIMS = 4
_ALIGNMENT = "general.alignment"

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFValue:
    """A value of the metadata with its type, so that it is written as it was read.

    Args:
        type: 0 uint8, 1 int8, 2 uint16, 3 int16, 4 uint32, 5 int32, 6 float32, 7 bool, 8 string,
            10 uint64, 11 int64, 12 float64; of the elements where `value` is a list.
        value: number, bool, str, or a list of one of these.
    """

    type: int
    value: Any


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of a file, its bytes not read yet.

    Args:
        name: in the file, such as "blk.0.ffn_up.weight".
        type: id of its type, see `fastweights.quantization.formats.gguf_blocks.TYPES`.
        shape: slowest dimension first, as in torch (the file has them the other way round).
        data: uint8 ``[rows, bytes per row]``, mapped from the file.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    data: Bytes

    @property
    def type_name(self) -> str:
        """Such as "Q4_1"."""
        return TYPES[self.type].name

    def read(
        self, *, rows: Tensor | None = None, activation: str = "float"
    ) -> Tensor | QuantizedTensor:
        """The tensor: floats as they are (a view of the file), blocks as a packed weight.

        Args:
            rows: int64, the order in which to take the rows; None for that of the file.
            activation: see `fastweights.quantize`.

        Raises:
            ValueError: a type that cannot be packed without loss, or values that are not finite.
        """
        blocks = TYPES[self.type].blocks
        data = torch.from_numpy(self.data)
        if self.type in FLOATS:
            floats = data.view(FLOATS[self.type]).view(self.shape)
            if not bool(floats.isfinite().all()):
                raise self._error("finite values", "an infinite or NaN one")
            return floats if rows is None else floats[rows]
        if blocks is None:
            known = [t.name for i, t in TYPES.items() if t.blocks is not None or i in FLOATS]
            raise self._error(f"a type that is read here ({', '.join(known)})", self.type_name)
        if len(self.shape) != 2:
            raise self._error("two dimensions of a quantized weight", f"{list(self.shape)}")
        return self._pack(blocks, data, rows, activation)

    def _pack(
        self, blocks: Blocks, data: Tensor, rows: Tensor | None, activation: str
    ) -> QuantizedTensor:
        size = TYPES[self.type].bytes
        largest = max(map(abs, FORMATS[blocks.format].levels))

        def part(start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
            taken = data[start:stop] if rows is None else data[rows[start:stop]]
            codes, parameters = blocks.read(taken.unflatten(1, (-1, size)))
            if not all(bool((p.float() * largest).isfinite().all()) for p in parameters):
                raise self._error("finite scales and minima", "an infinite or NaN one")
            groups = codes.unflatten(2, (-1, blocks.group_size)).flatten(1, 2)
            shape = (*codes.shape[:2], groups.shape[1] // codes.shape[1])
            return groups, [p.expand(shape).flatten(1) for p in parameters]

        n, k = self.shape
        return pack_rows(blocks.format, (n, k), blocks.group_size, activation, part)

    def _error(self, rule: str, came: object) -> ValueError:
        return _error(self.name, rule, came)

    @classmethod
    def of(cls, name: str, tensor: Tensor | QuantizedTensor, type_name: str) -> GGUFTensor:
        """A tensor to be written.

        Args:
            name: in the file.
            tensor: floats of any shape for F32, F16 and BF16, whose dtype they must have; a packed
                weight for the others.
            type_name: such as "Q4_1".

        Raises:
            ValueError: a type that is not written here, or one that does not hold the tensor.
        """
        kind, form = next(
            ((i, t) for i, t in TYPES.items() if t.name == type_name), (-1, TensorType("", 1, 1))
        )
        if kind in FLOATS and isinstance(tensor, Tensor) and tensor.dtype == FLOATS[kind]:
            shape = tuple(tensor.shape)
            if not 1 <= len(shape) <= _MOST_DIMS or not all(shape):
                raise _error(name, f"1 to {_MOST_DIMS} dimensions, none of them 0", f"{[*shape]}")
            rows = tensor.detach().contiguous().view(-1, shape[-1])
            return cls(name, kind, shape, rows.view(torch.uint8).numpy())
        if form.blocks is None or not isinstance(tensor, QuantizedTensor):
            came = tensor.dtype if isinstance(tensor, Tensor) else tensor
            raise _error(name, f"a tensor that is {type_name}", came)
        if tensor.format != form.blocks.format or tensor.shape[1] % form.weights:
            rule = f"{form.blocks.format} with inputs in multiples of {form.weights}"
            raise _error(name, f"{rule} for {type_name}", tensor)
        return cls(name, kind, tensor.shape, _blocks_of(name, tensor, form, form.blocks).numpy())


@dataclass(frozen=True, eq=False)
class GGUF:
    """What a file holds.

    Args:
        metadata: by key, in the order of the file.
        tensors: by name, in the order of the file.
        version: of the container, 2 or 3.
    """

    metadata: dict[str, GGUFValue]
    tensors: dict[str, GGUFTensor]
    version: int = 3


def read_gguf(path: str | Path) -> GGUF:
    """Reads the metadata of a file and maps its tensors into memory.

    Args:
        path: the file; it must not change while the result is in use.

    Raises:
        ValueError: the file cannot be read, is truncated or damaged.

    Example:
        >>> import tempfile
        >>> from fastweights.quantization.formats import GGUF, GGUFTensor, read_gguf, write_gguf
        >>> import torch, fastweights as fw
        >>> weight = fw.quantize(torch.randn(48, 64), "int4", group_size=32)
        >>> tensor = GGUFTensor.of("output.weight", weight, "Q4_1")
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     write_gguf(file.name, GGUF({}, {tensor.name: tensor}))
        ...     again = read_gguf(file.name).tensors["output.weight"].read()
        >>> torch.equal(again.packed, weight.packed)
        True
    """
    return _parse(map_file("gguf", path))


def write_gguf(path: str | Path, file: GGUF) -> None:
    """Writes a file as llama.cpp's own tools do; one that `read_gguf` read gives the same bytes.

    Args:
        path: to be written, by way of a temporary file beside it: it may be the one that the
            tensors are mapped from.
        file: what it holds. "general.alignment" counts where the metadata has it.

    Raises:
        ValueError: a value of the metadata that is not of its type.
    """
    alignment = _alignment(file.metadata)
    head = bytearray(
        _MAGIC + struct.pack("<IQQ", file.version, len(file.tensors), len(file.metadata))
    )
    for key, value in file.metadata.items():
        try:
            head += _packed_string(key) + _packed_value(value)
        except (struct.error, KeyError, AttributeError, UnicodeEncodeError) as error:
            rule = f"a value, or a list of values, of type {value.type}"
            raise _error(key, rule, f"{value.value!r:.80}") from error
    offset = 0
    for name, tensor in file.tensors.items():
        head += _packed_string(name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        head += struct.pack("<IQ", tensor.type, offset)
        offset += _aligned(tensor.data.nbytes, alignment)
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(head)
            _pad(out, len(head), alignment)
            for tensor in file.tensors.values():
                np.ascontiguousarray(tensor.data).tofile(out)
                _pad(out, tensor.data.nbytes, alignment)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


class _Cursor:
    """A place in the bytes of a file that never leaves them."""

    def __init__(self, whole: Bytes) -> None:
        self.bytes = whole.data
        self.at = 0

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.bytes) - self.at:
            raise _error(
                what,
                f"{count} bytes at {self.at}",
                f"{len(self.bytes) - self.at} to the end of the file",
            )
        taken = self.bytes[self.at : self.at + count]
        self.at += count
        return taken

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, least: int, what: str) -> int:
        """A number of things of at least `least` bytes each that are still to come."""
        count = int(self.number("Q", what))
        if count * least > len(self.bytes) - self.at:
            raise _error(what, "a count that fits into the file", count)
        return count

    def string(self, what: str) -> str:
        raw = bytes(self.take(self.count(1, what), what))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _error(what, "UTF-8", f"{raw[:32]!r}") from error


def _parse(whole: Bytes) -> GGUF:
    cursor = _Cursor(whole)
    magic = bytes(cursor.take(4, "magic"))
    if magic != _MAGIC:
        raise _error("magic", f"{_MAGIC!r}", f"{magic!r}")
    version = cursor.number("I", "version")
    if version not in _VERSIONS:
        raise _error("version", f"one of {_VERSIONS}, little-endian", version)
    tensor_count = cursor.count(24, "tensor count")
    value_count = cursor.count(13, "metadata count")
    metadata: dict[str, GGUFValue] = {}
    for _ in range(value_count):
        key = cursor.string("metadata key")
        if key in metadata:
            raise _error(key, "one value", "two")
        metadata[key] = _value(cursor, key)
    alignment = _alignment(metadata)
    heads = [_tensor_head(cursor) for _ in range(tensor_count)]
    start = _aligned(cursor.at, alignment)
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in heads:
        if name in tensors:
            raise _error(name, "one tensor of this name", "two")
        if offset % alignment:
            raise _error(name, f"an offset in multiples of {alignment}", offset)
        size = prod(shape) // TYPES[kind].weights * TYPES[kind].bytes
        if start + offset + size > len(whole):
            raise _error(name, f"{size} bytes at {start + offset}", f"a file of {len(whole)}")
        data = whole[start + offset : start + offset + size].reshape(prod(shape[:-1]), -1)
        tensors[name] = GGUFTensor(name, kind, shape, data)
    return GGUF(metadata, tensors, version)


def _tensor_head(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("tensor name")
    dims = cursor.number("I", name)
    if not 1 <= dims <= _MOST_DIMS:
        raise _error(name, f"1 to {_MOST_DIMS} dimensions", dims)
    shape = tuple(int(cursor.number("Q", name)) for _ in range(dims))[::-1]
    if not all(0 < size < _MOST for size in shape):
        raise _error(name, "dimensions below 2^31", f"{list(shape)}")
    kind, offset = cursor.number("I", name), int(cursor.number("Q", name))
    if kind not in TYPES:
        raise _error(name, "a known tensor type", kind)
    if shape[-1] % TYPES[kind].weights:
        raise _error(
            name,
            f"rows in multiples of {TYPES[kind].weights} for {TYPES[kind].name}",
            f"{shape[-1]}",
        )
    return name, shape, kind, offset


def _value(cursor: _Cursor, key: str) -> GGUFValue:
    kind = cursor.number("I", key)
    if kind != _ARRAY:
        return GGUFValue(kind, _scalar(cursor, key, kind))
    kind = cursor.number("I", key)
    if kind == _STRING:
        return GGUFValue(kind, [cursor.string(key) for _ in range(cursor.count(8, key))])
    if kind not in _NUMBERS:
        raise _error(key, "a type of array elements", kind)
    code = _NUMBERS[kind]
    count = cursor.count(struct.calcsize("<" + code), key)
    raw = cursor.take(count * struct.calcsize("<" + code), key)
    if kind == _BOOL:
        _check_bools(key, raw)
    return GGUFValue(kind, list(struct.unpack(f"<{count}{code}", raw)))


def _scalar(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == _STRING:
        return cursor.string(key)
    if kind not in _NUMBERS:
        raise _error(key, "a type of metadata", kind)
    if kind == _BOOL:
        _check_bools(key, raw := cursor.take(1, key))
        return raw[0] == 1
    return cursor.number(_NUMBERS[kind], key)


def _check_bools(key: str, raw: memoryview) -> None:
    if raw and max(raw) > 1:
        raise _error(key, "0 or 1 as bool", f"{max(raw)}")


def _alignment(metadata: dict[str, GGUFValue]) -> int:
    value = metadata.get(_ALIGNMENT, GGUFValue(4, 32))
    number = value.value
    if (
        value.type != 4
        or type(number) is not int
        or not 8 <= number <= 1 << 20
        or number & (number - 1)
    ):
        raise _error(_ALIGNMENT, "uint32, a power of two from 8 to 2^20", f"{number!r:.80}")
    return number


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(out: BinaryIO, size: int, alignment: int) -> None:
    out.write(bytes(_aligned(size, alignment) - size))


def _packed_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _packed_value(value: GGUFValue) -> bytes:
    pack: Callable[[Any], bytes] = (
        _packed_string
        if value.type == _STRING
        else lambda number: struct.pack("<" + _NUMBERS[value.type], number)
    )
    if not isinstance(value.value, list):
        return struct.pack("<I", value.type) + pack(value.value)
    head = struct.pack("<IIQ", _ARRAY, value.type, len(value.value))
    items: Iterable[Any] = value.value
    return head + b"".join(pack(item) for item in items)


def _blocks_of(name: str, weight: QuantizedTensor, type_: TensorType, blocks: Blocks) -> Tensor:
    """The bytes of a packed weight ``[N, bytes per row]``; a larger group is as many blocks."""
    n, k = weight.shape
    repeat = weight.group_size // blocks.group_size
    parts = []
    for start, stop in row_parts(n, k):
        part = rows_of(weight, start, stop)
        codes = unpack_codes(part).flatten(1)[:, :k].unflatten(1, (-1, type_.weights))
        groups = type_.weights // blocks.group_size
        parameters = [
            p.repeat_interleave(repeat, 1)[:, : k // blocks.group_size].unflatten(1, (-1, groups))
            for p in unpack_stored(part)
        ]
        if not blocks.fits(parameters):
            raise _error(name, f"a weight that {type_.name} holds", "other minima")
        parts.append(blocks.write(codes, parameters).flatten(1))
    return torch.cat(parts)


def _error(name: str, rule: str, came: object) -> ValueError:
    return broken("gguf", name, rule, came)
