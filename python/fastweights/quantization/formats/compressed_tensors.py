"""Checkpoints of compressed-tensors, packed ("pack-quantized")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastweights.quantization.formats import affine
from fastweights.quantization.formats.affine import Affine
from fastweights.quantization.formats.bits import as_bytes, as_words, pack_bits, unpack_bits
from fastweights.quantization.formats.check import FLOATS, Tensors, integer_setting, setting
from fastweights.quantization.formats.layer import Layer
from fastweights.quantization.formats.rows import row_parts

__all__ = ["CompressedTensors"]

_FORMAT = "compressed-tensors"
_DENSE_SINCE = (0, 18)


@dataclass(frozen=True)
class CompressedTensors:
    """Layers as llm-compressor writes them (``quant_method: "compressed-tensors"``).

    ``W[n, k] = weight_scale[n, g] * (code[n, k] - zero[n, g])`` with ``weight_packed`` int32 (a bit
    stream of codes along K per row), ``weight_shape`` int64 ``[2]``, ``weight_scale`` ``[N, G]``,
    ``weight_zero_point`` int32 (a bit stream along N per group) unless symmetric, perhaps
    ``weight_g_idx`` int32 ``[K]`` and ``bias`` ``[N]``. Codes and zero points are stored with
    ``2**(bits - 1)`` added; of symmetric files that is the zero point.

    Args:
        bits: 1 to 8.
        group_size: inputs per scale; -1 for all (strategy "channel").
        symmetric: no zero points.
        dense: codes run on from word to word, as since release 0.18; else a word holds
            ``32 // bits`` of them. Both are read, told apart by their sizes where they can be;
            with bits that divide 32 they are the same.
        g_idx: whether layers have one where it says nothing. All -1 counts as none.

    Example:
        >>> import torch
        >>> from fastweights.quantization.formats import CompressedTensors
        >>> tensors = {
        ...     "weight_packed": torch.full((32, 8), 0x76543210, dtype=torch.int32),
        ...     "weight_shape": torch.tensor([32, 64]),
        ...     "weight_scale": torch.ones(32, 1, dtype=torch.bfloat16),
        ... }
        >>> CompressedTensors(group_size=64).read(tensors).dequantize()[0, :4]
        tensor([-8., -7., -6., -5.])
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    dense: bool = True
    g_idx: bool = False

    key = "weight_packed"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"{_FORMAT}: num_bits: expected 1 to 8, got {self.bits}")
        affine.group_width(_FORMAT, self.bits, self.group_size, 32)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensors:
        """Settings from ``quantization_config`` of config.json.

        Raises:
            ValueError: a variant that is not supported (quantized activations or caches, several
                settings in one model, other formats of compressed-tensors), or nonsense.
        """
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ValueError(f"{_FORMAT}: config_groups: expected at least one, got {groups!r:.80}")
        settings = {cls._from_group(config, group) for group in groups.values()}
        if len(settings) > 1:
            raise ValueError(
                f"{_FORMAT}: config_groups: expected one setting for all layers, got several"
            )
        if config.get("kv_cache_scheme") is not None:
            raise ValueError(f"{_FORMAT}: kv_cache_scheme: expected none, got one")
        return settings.pop()

    @classmethod
    def _from_group(cls, config: Mapping[str, Any], group: Any) -> CompressedTensors:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ValueError(f"{_FORMAT}: weights: expected settings, got {weights!r:.80}")
        for key in ("input_activations", "output_activations"):
            if group.get(key) is not None:
                raise ValueError(f"{_FORMAT}: {key}: expected none, got {group[key]!r:.80}")
        form = group.get("format") or config.get("format")
        if form != "pack-quantized":
            raise ValueError(f"{_FORMAT}: format: expected pack-quantized, got {form!r:.80}")
        setting(_FORMAT, weights, "type", ("int",))
        strategy = setting(_FORMAT, weights, "strategy", ("group", "channel"))
        symmetric = setting(_FORMAT, weights, "symmetric", (True, False))
        bits = integer_setting(_FORMAT, weights, "num_bits")
        size = -1 if strategy == "channel" else integer_setting(_FORMAT, weights, "group_size")
        return cls(bits, size, symmetric, _version(config.get("version")) >= _DENSE_SINCE)

    def read(
        self, tensors: Mapping[str, Tensor], name: str = "", *, activation: str = "float"
    ) -> Layer:
        """A layer from its tensors.

        Args:
            tensors: "weight_packed", "weight_shape", "weight_scale", "weight_zero_point" unless
                symmetric, perhaps "weight_g_idx" and "bias".
            name: of the layer, for messages.
            activation: see `fastweights.quantize`.

        Raises:
            ValueError: tensors that do not go together, values out of range.
        """
        found = Tensors(_FORMAT, tensors, name)
        packed = found.take("weight_packed", [torch.int32], [None, None], "[N, words]")
        shape = found.take("weight_shape", [torch.int64], [2], "[2]").tolist()
        n, k, columns = packed.shape[0], shape[1], packed.shape[1]
        dense = self.dense if self._columns(k, self.dense) == columns else not self.dense
        if shape[0] != n or not 0 < k < 1 << 31 or self._columns(k, dense) != columns:
            raise found.error("weight_shape", f"[{n}, inputs] of {columns} words", f"{shape}")
        groups = affine.group_count(_FORMAT, self.bits, self.group_size, k)
        scale = found.take_finite("weight_scale", FLOATS, [n, groups], "[N, groups]")
        zero = torch.full((n, groups), 1 << (self.bits - 1))
        if not self.symmetric:
            sizes = [self._columns(n, dense), groups]
            words = found.take("weight_zero_point", [torch.int32], sizes, "[words of N, groups]")
            zero = self._unpack(words.T, n, dense).T
        order = self._order(found, k)
        bias = found.take_bias(n)
        found.end()

        def codes(start: int, stop: int) -> Tensor:
            return self._unpack(packed[start:stop], k, dense)

        source = Affine((n, k), self.bits, self.group_size, codes, scale, zero, order, bias)
        return affine.to_layer(found, source, activation)

    def write(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of a layer.

        Args:
            layer: from `read` of this or another format, or ``Layer(quantized_tensor)``.

        Raises:
            ValueError: this format cannot hold the layer.
        """
        source = affine.from_layer(_FORMAT, layer, self.bits, self.group_size)
        n, k = source.shape
        rows = [self._pack(source.codes(start, stop)) for start, stop in row_parts(n, k)]
        tensors = {
            "weight_packed": torch.cat(rows),
            "weight_shape": torch.tensor([n, k]),
            "weight_scale": source.scale.contiguous(),
        }
        if self.symmetric:
            affine.require_middle_zeros(_FORMAT, source)
        else:
            zero = self._pack(source.zero.T.to(torch.uint8))
            tensors["weight_zero_point"] = zero.T.contiguous()
        if self.g_idx or source.order is not None:
            tensors["weight_g_idx"] = affine.input_groups(_FORMAT, source)
        if source.bias is not None:
            tensors["bias"] = source.bias
        return tensors

    def _order(self, found: Tensors, k: int) -> Tensor | None:
        if "weight_g_idx" not in found:
            return None
        g_idx = found.take("weight_g_idx", [torch.int32], [k], "[in_features]")
        if bool((g_idx == -1).all()):
            return None
        width = affine.group_width(_FORMAT, self.bits, self.group_size, k)
        return affine.input_order(found, "weight_g_idx", g_idx, width)

    def _columns(self, count: int, dense: bool) -> int:
        """Words of `count` codes."""
        return -(-count * self.bits // 32) if dense else -(-count // (32 // self.bits))

    def _unpack(self, words: Tensor, count: int, dense: bool) -> Tensor:
        stream = as_bytes(words)
        if dense:
            return unpack_bits(stream, self.bits, count)
        codes = unpack_bits(stream.reshape(-1, 4), self.bits, 32 // self.bits)
        return codes.reshape(words.shape[0], -1)[:, :count]

    def _pack(self, codes: Tensor) -> Tensor:
        if self.dense:
            return as_words(pack_bits(codes, self.bits))
        each = 32 // self.bits
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
        words = as_words(pack_bits(codes.reshape(-1, each), self.bits))
        return words.reshape(codes.shape[0], -1)


def _version(text: Any) -> tuple[int, ...]:
    """(0, 18) of "0.18.1.a20260101"; without one, the newest."""
    parts = str(text).split(".")[:2] if isinstance(text, str) else []
    if len(parts) < 2 or not all(p.isascii() and p.isdigit() and len(p) < 9 for p in parts):
        return _DENSE_SINCE
    return tuple(int(p) for p in parts)
