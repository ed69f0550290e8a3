"""GPTQ checkpoints, both versions of the format."""

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

__all__ = ["GPTQ"]

_FORMAT = "gptq"
_VERSIONS = {None: 1, "gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True)
class GPTQ:
    """Layers as AutoGPTQ and GPTQModel write them (``quant_method: "gptq"``).

    ``W[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])`` with ``qweight`` int32
    ``[K * bits / 32, N]`` (a bit stream of codes along K per column), ``qzeros`` int32
    ``[G, N * bits / 32]`` (along N), ``scales`` ``[G, N]``, ``g_idx`` int32 ``[K]`` and an optional
    ``bias`` ``[N]``. Version 1 stores ``(zero - 1) mod 2**bits``, version 2 ``zero``.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: inputs per scale; -1 for all.
        version: 1 ("gptq") or 2 ("gptq_v2").
        g_idx: whether layers have one where it says nothing; act-order always has one.

    Example:
        >>> import torch
        >>> from fastweights.quantization.formats import GPTQ
        >>> tensors = {
        ...     "qweight": torch.full((8, 32), 0x76543210, dtype=torch.int32),
        ...     "qzeros": torch.full((1, 4), 0x77777777, dtype=torch.int32),
        ...     "scales": torch.ones(1, 32, dtype=torch.float16),
        ...     "g_idx": torch.zeros(64, dtype=torch.int32),
        ... }
        >>> layer = GPTQ(bits=4, group_size=64).read(tensors)
        >>> layer.dequantize()[0, :4]
        tensor([-8., -7., -6., -5.])
    """

    bits: int = 4
    group_size: int = 128
    version: int = 1
    g_idx: bool = True

    key = "qweight"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"{_FORMAT}: bits: expected 2, 3, 4 or 8, got {self.bits}")
        if self.version not in (1, 2):
            raise ValueError(f"{_FORMAT}: version: expected 1 or 2, got {self.version}")
        affine.group_width(_FORMAT, self.bits, self.group_size, 32)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GPTQ:
        """Settings from ``quantization_config`` of config.json, or from quantize_config.json.

        Raises:
            ValueError: a variant that is not supported, or nonsense.
        """
        kind = setting(_FORMAT, config, "checkpoint_format", tuple(_VERSIONS))
        setting(_FORMAT, config, "pack_dtype", (None, "int32"))
        if config.get("dynamic"):
            raise ValueError(
                f"{_FORMAT}: dynamic: expected one setting for all layers, got several"
            )
        bits = integer_setting(_FORMAT, config, "bits")
        return cls(bits, integer_setting(_FORMAT, config, "group_size"), _VERSIONS[kind])

    def read(
        self, tensors: Mapping[str, Tensor], name: str = "", *, activation: str = "float"
    ) -> Layer:
        """A layer from its tensors.

        Args:
            tensors: "qweight", "qzeros", "scales", perhaps "g_idx" and "bias".
            name: of the layer, for messages.
            activation: see `fastweights.quantize`.

        Raises:
            ValueError: tensors that do not go together, values out of range.
        """
        found = Tensors(_FORMAT, tensors, name)
        qweight = found.take("qweight", [torch.int32], [None, None], "[in_features * bits / 32, N]")
        n, k = qweight.shape[1], qweight.shape[0] * 32 // self.bits
        if qweight.shape[0] * 32 % self.bits or k % 32 or n % 32:
            raise found.error(
                "qweight", "multiples of 32 as in_features and N", f"{list(qweight.shape)}"
            )
        groups = affine.group_count(_FORMAT, self.bits, self.group_size, k)
        words = [groups, n * self.bits // 32]
        qzeros = found.take("qzeros", [torch.int32], words, "[groups, N * bits / 32]")
        scales = found.take_finite("scales", FLOATS, [groups, n], "[groups, N]")
        order = None
        if "g_idx" in found:
            g_idx = found.take("g_idx", [torch.int32], [k], "[in_features]")
            width = affine.group_width(_FORMAT, self.bits, self.group_size, k)
            order = affine.input_order(found, "g_idx", g_idx, width)
        bias = found.take_bias(n)
        found.end()

        zero = unpack_bits(as_bytes(qzeros), self.bits, n).T
        if self.version == 1:
            zero = (zero + 1) & ((1 << self.bits) - 1)

        def codes(start: int, stop: int) -> Tensor:
            return unpack_bits(as_bytes(qweight[:, start:stop].T), self.bits, k)

        source = Affine((n, k), self.bits, self.group_size, codes, scales.T, zero, order, bias)
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
        if n % 32 or k % 32:
            raise ValueError(
                f"{_FORMAT}: expected multiples of 32 as N and in_features, got {n, k}"
            )
        columns = [
            as_words(pack_bits(source.codes(start, stop), self.bits)).T
            for start, stop in row_parts(n, k)
        ]
        zero = source.zero.T.to(torch.uint8)
        if self.version == 1:
            zero = (zero - 1) & ((1 << self.bits) - 1)
        tensors = {
            "qweight": torch.cat(columns, 1),
            "qzeros": as_words(pack_bits(zero, self.bits)),
            "scales": source.scale.T.contiguous(),
        }
        if self.g_idx or source.order is not None:
            tensors["g_idx"] = affine.input_groups(_FORMAT, source)
        if source.bias is not None:
            tensors["bias"] = source.bias
        return tensors
