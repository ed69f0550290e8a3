"""AWQ checkpoints in the layout of its GEMM kernels."""

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

__all__ = ["AWQ"]

_FORMAT = "awq"
_BITS = 4
# Nibble i of a word is output _OUTPUT[i] of its eight; output j is in nibble _NIBBLE[j].
_OUTPUT = [0, 2, 4, 6, 1, 3, 5, 7]
_NIBBLE = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class AWQ:
    """Layers as AutoAWQ writes them (``quant_method: "awq"``, ``version: "gemm"``), 4 bits.

    ``W[n, k] = scales[g, n] * (code[k, n] - zero[g, n])`` with ``qweight`` int32 ``[K, N / 8]``,
    packed along N with an interleave, ``qzeros`` int32 ``[G, N / 8]`` likewise, ``scales``
    ``[G, N]`` and an optional ``bias`` ``[N]``.

    Args:
        group_size: inputs per scale; -1 for all.

    Example:
        >>> import torch
        >>> from fastweights.quantization.formats import AWQ
        >>> tensors = {
        ...     "qweight": torch.full((64, 4), 0x75316420, dtype=torch.int32),
        ...     "qzeros": torch.zeros(1, 4, dtype=torch.int32),
        ...     "scales": torch.ones(1, 32, dtype=torch.float16),
        ... }
        >>> AWQ(group_size=64).read(tensors).dequantize()[:4, 0]
        tensor([0., 1., 2., 3.])
    """

    group_size: int = 128

    key = "qweight"

    def __post_init__(self) -> None:
        affine.group_width(_FORMAT, _BITS, self.group_size, 32)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AWQ:
        """Settings from ``quantization_config`` of config.json.

        Raises:
            ValueError: a variant that is not supported (the layouts of other kernels), or nonsense.
        """
        version = config.get("version", config.get("format", "gemm"))
        if not isinstance(version, str) or version.lower() != "gemm":
            raise ValueError(f"{_FORMAT}: version: expected gemm, got {version!r:.80}")
        setting(_FORMAT, config, "zero_point", (None, True))
        bits = integer_setting(_FORMAT, config, "bits", "w_bit")
        if bits != _BITS:
            raise ValueError(f"{_FORMAT}: bits: expected 4, got {bits}")
        return cls(integer_setting(_FORMAT, config, "group_size", "q_group_size"))

    def read(
        self, tensors: Mapping[str, Tensor], name: str = "", *, activation: str = "float"
    ) -> Layer:
        """A layer from its tensors.

        Args:
            tensors: "qweight", "qzeros", "scales", perhaps "bias".
            name: of the layer, for messages.
            activation: see `fastweights.quantize`.

        Raises:
            ValueError: tensors that do not go together, values out of range.
        """
        found = Tensors(_FORMAT, tensors, name)
        qweight = found.take("qweight", [torch.int32], [None, None], "[in_features, N / 8]")
        k, n = qweight.shape[0], qweight.shape[1] * 8
        groups = affine.group_count(_FORMAT, _BITS, self.group_size, k)
        qzeros = found.take("qzeros", [torch.int32], [groups, n // 8], "[groups, N / 8]")
        scales = found.take_finite("scales", FLOATS, [groups, n], "[groups, N]")
        bias = found.take_bias(n)
        found.end()

        def codes(start: int, stop: int) -> Tensor:
            return _unpack(qweight[:, start // 8 : stop // 8]).T

        source = Affine(
            (n, k), _BITS, self.group_size, codes, scales.T, _unpack(qzeros).T, bias=bias
        )
        return affine.to_layer(found, source, activation)

    def write(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of a layer.

        Args:
            layer: from `read` of this or another format, or ``Layer(quantized_tensor)``.

        Raises:
            ValueError: this format cannot hold the layer.
        """
        source = affine.from_layer(_FORMAT, layer, _BITS, self.group_size)
        n, k = source.shape
        if n % 8:
            raise ValueError(f"{_FORMAT}: expected a multiple of 8 as N, got {n}")
        if source.order is not None:
            raise ValueError(f"{_FORMAT}: expected inputs in the order of their groups, got others")
        columns = [_pack(source.codes(start, stop).T) for start, stop in row_parts(n, k)]
        tensors = {
            "qweight": torch.cat(columns, 1),
            "qzeros": _pack(source.zero.T.to(torch.uint8)),
            "scales": source.scale.T.contiguous(),
        }
        if source.bias is not None:
            tensors["bias"] = source.bias
        return tensors


def _unpack(words: Tensor) -> Tensor:
    """int32 ``[R, C]`` to codes uint8 ``[R, 8 C]`` in the order of the outputs."""
    nibbles: Tensor = unpack_bits(as_bytes(words), _BITS, words.shape[1] * 8)
    codes: Tensor = nibbles.unflatten(1, (-1, 8))[..., _NIBBLE].flatten(1)
    return codes


def _pack(codes: Tensor) -> Tensor:
    nibbles = codes.unflatten(1, (-1, 8))[..., _OUTPUT].flatten(1)
    return as_words(pack_bits(nibbles, _BITS))
