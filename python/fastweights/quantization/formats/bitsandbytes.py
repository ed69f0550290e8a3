"""Checkpoints of bitsandbytes, 4 bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, isfinite
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.layout import unpack_codes, unpack_stored
from fastweights.quantization.formats.check import Tensors, setting
from fastweights.quantization.formats.layer import Layer
from fastweights.quantization.formats.rows import pack_rows, row_parts, rows_of

__all__ = ["BitsAndBytes4Bit"]

_FORMAT = "bitsandbytes"
_TYPES = ("nf4", "fp4")
_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_STORAGES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
}


@dataclass(frozen=True)
class BitsAndBytes4Bit:
    """Layers of 4 bits as bitsandbytes writes them (``load_in_4bit``, QLoRA), NF4 or FP4.

    The weight is flat, row by row, and cut into blocks that share an absolute maximum:
    ``W.flatten()[i] = quant_map[code[i]] * absmax[i // blocksize]`` with ``weight`` uint8
    ``[N * K / 2, 1]`` (or its bytes as another dtype), the first of two codes in the high bits.
    ``absmax`` is float32; with double quantization uint8, and
    ``nested_quant_map[absmax[j]] * nested_absmax[j // nested_blocksize] + nested_offset`` is meant.
    Blocks that cross rows are cut at their ends, where 32 divides in_features.

    Args:
        quant_type: "nf4" or "fp4", of what is written.
        block_size: weights per absmax, of layers that are written and did not come from such a
            file; a power of two from 32.
        storage: dtype of ``weight``.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.quantization.formats import BitsAndBytes4Bit, Layer
        >>> weight = fw.quantize(torch.randn(16, 64), "nf4")
        >>> tensors = BitsAndBytes4Bit().write(Layer(weight))
        >>> torch.equal(BitsAndBytes4Bit().read(tensors).weight.packed, weight.packed)
        True
    """

    quant_type: str = "nf4"
    block_size: int = 64
    storage: torch.dtype = torch.uint8

    key = "weight.absmax"

    def __post_init__(self) -> None:
        if self.quant_type not in _TYPES:
            raise ValueError(
                f"{_FORMAT}: quant_type: expected one of {_TYPES}, got {self.quant_type!r:.80}"
            )
        if not _is_block_size(self.block_size):
            raise ValueError(
                f"{_FORMAT}: block_size: expected a power of two from 32 to 4096, "
                f"got {self.block_size}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BitsAndBytes4Bit:
        """Settings from ``quantization_config`` of config.json.

        Raises:
            ValueError: a variant that is not supported, or nonsense.
        """
        setting(_FORMAT, config, "load_in_8bit", (None, False))
        kind = setting(_FORMAT, config, "bnb_4bit_quant_type", _TYPES)
        storage = setting(_FORMAT, config, "bnb_4bit_quant_storage", (None, *_STORAGES))
        return cls(kind, storage=_STORAGES[storage or "uint8"])

    def read(
        self, tensors: Mapping[str, Tensor], name: str = "", *, activation: str = "float"
    ) -> Layer:
        """A layer from its tensors.

        Args:
            tensors: "weight", "weight.absmax", "weight.quant_map",
                "weight.quant_state.bitsandbytes__nf4" or "...fp4", with double quantization
                "weight.nested_absmax" and "weight.nested_quant_map", perhaps "bias".
            name: of the layer, for messages.
            activation: see `fastweights.quantize`.

        Raises:
            ValueError: tensors that do not go together, values out of range, in_features that 32
                does not divide.
        """
        found = Tensors(_FORMAT, tensors, name)
        state = _State.take(found)
        n, k = state.shape
        group = gcd(state.block_size, k)
        if group % 32:
            raise found.error("weight", "in_features in multiples of 32", f"{k}")
        size = n * k // 2 // self.storage.itemsize
        weight = found.take("weight", [self.storage], [size, 1], "[bytes, 1]")
        absmax, kept = state.absmax(found)
        bias = found.take_bias(n)
        found.end()
        stream = weight.contiguous().view(torch.uint8).view(n, k // 2)
        scale = _spread(absmax, state.block_size, n * k, group).view(n, -1)

        def part(start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
            taken = stream[start:stop]
            codes = torch.stack([taken >> 4, taken & 15], 2).view(stop - start, -1, group)
            return codes, [scale[start:stop]]

        packed = pack_rows(state.quant_type, (n, k), group, activation, part)
        return Layer(packed, bias, scale_dtype=torch.float32, kept=kept)

    def write(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of a layer.

        Args:
            layer: from `read`, which keeps its blocks and double quantization, or
                ``Layer(quantized_tensor)``, whose scales become float32 absmax.

        Raises:
            ValueError: this format cannot hold the layer.
        """
        weight = layer.weight
        n, k = weight.shape
        if weight.format != self.quant_type or layer.order is not None or k % 32:
            raise ValueError(
                f"{_FORMAT}: expected a weight in {self.quant_type}, its inputs in multiples of 32 "
                f"and in their own order, got {weight}"
            )
        rows = []
        for start, stop in row_parts(n, k):
            codes = unpack_codes(rows_of(weight, start, stop)).flatten(1)[:, :k]
            high, low = codes.unflatten(1, (-1, 2)).unbind(2)
            rows.append((high << 4) | low)
        (scale,) = unpack_stored(weight)
        tensors = {"weight": torch.cat(rows).view(self.storage).view(-1, 1)}
        tensors |= self._blocks(layer, scale)
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def _blocks(self, layer: Layer, scale: Tensor) -> dict[str, Tensor]:
        """The tensors about blocks: those of the file if they give `scale`, else new ones."""
        n, k = layer.weight.shape
        group, flat = layer.weight.group_size, scale.flatten()
        if layer.kept:
            kept = Tensors(_FORMAT, layer.kept)
            state = _State.take(kept)
            absmax, tensors = state.absmax(kept)
            of_this = (state.quant_type, state.shape) == (layer.weight.format, (n, k))
            if of_this and torch.equal(_spread(absmax, state.block_size, n * k, group), flat):
                return tensors
        blocks = _spread(flat, group, n * k, self.block_size)
        if k % group or not torch.equal(_spread(blocks, self.block_size, n * k, group), flat):
            raise ValueError(
                f"{_FORMAT}: expected one scale in every {self.block_size} weights, got others"
            )
        said = {
            "quant_type": self.quant_type, "blocksize": self.block_size, "dtype": "float16",
            "shape": [n, k],
        }  # fmt: skip
        text = json.dumps(said).encode()
        return {
            "weight.absmax": blocks,
            "weight.quant_map": torch.tensor(FORMATS[self.quant_type].levels),
            _STATE + self.quant_type: torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }


@dataclass(frozen=True)
class _State:
    """What the JSON beside a weight says."""

    quant_type: str
    block_size: int
    shape: tuple[int, int]
    nested_block_size: int | None
    nested_offset: float
    raw: Tensor

    @classmethod
    def take(cls, found: Tensors) -> _State:
        kind = next((t for t in _TYPES if _STATE + t in found), "nf4")
        name = _STATE + kind
        raw = found.take(name, [torch.uint8], [None], "[bytes of JSON]")
        try:
            value = json.loads(bytes(raw.tolist()))
        except (ValueError, RecursionError) as error:
            raise found.error(name, "JSON", "something else") from error
        if not isinstance(value, dict) or value.get("quant_type") != kind:
            raise found.error(name, f"an object with quant_type {kind!r}", f"{value!r:.80}")
        shape, block_size = value.get("shape"), value.get("blocksize")
        if not (
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
        ):
            raise found.error(name, "shape to be [N, in_features]", f"{shape!r:.80}")
        nested, offset = value.get("nested_blocksize"), value.get("nested_offset", 0.0)
        if not _is_block_size(block_size) or not (nested is None or _is_block_size(nested)):
            sizes = f"{block_size!r:.40} and {nested!r:.40}"
            raise found.error(name, "block sizes of a power of two from 32 to 4096", sizes)
        if type(offset) is not float or not isfinite(offset):
            raise found.error(name, "a finite nested_offset", f"{offset!r:.80}")
        return cls(kind, block_size, (shape[0], shape[1]), nested, offset, raw)

    def absmax(self, found: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Absolute maximum of every block, float32, and copies of the tensors that say it."""
        blocks = -(-self.shape[0] * self.shape[1] // self.block_size)
        levels = torch.tensor(FORMATS[self.quant_type].levels)
        kept = {_STATE + self.quant_type: self.raw}
        kept["weight.quant_map"] = found.take("weight.quant_map", [torch.float32], [16], "[16]")
        if not bool((kept["weight.quant_map"] == levels).all()):
            raise found.error("weight.quant_map", f"the levels of {self.quant_type}", "others")
        nested = self.nested_block_size
        if nested is None:
            absmax = found.take_finite("weight.absmax", [torch.float32], [blocks], "[blocks]")
            kept["weight.absmax"] = absmax
        else:
            codes = found.take("weight.absmax", [torch.uint8], [blocks], "[blocks]")
            sizes = ([-(-blocks // nested)], [256])
            scale, levels = (
                found.take_finite(key, [torch.float32], size, f"{size}")
                for key, size in zip(_NESTED, sizes, strict=True)
            )
            kept |= {"weight.absmax": codes, **dict(zip(_NESTED, (scale, levels), strict=True))}
            absmax = levels[codes.long()] * scale.repeat_interleave(nested)[:blocks]
            absmax = absmax + self.nested_offset
            if not bool(absmax.isfinite().all()):
                raise found.error("weight.nested_absmax", "finite maxima", "larger ones")
        return absmax, {name: tensor.clone() for name, tensor in kept.items()}


def _spread(values: Tensor, every: int, count: int, step: int) -> Tensor:
    """Of one value for `every` weights, those at weights 0, `step`, ... below `count`."""
    return values[torch.arange(0, count, step) // every]


def _is_block_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 32 <= value <= 4096 and value & (value - 1) == 0
