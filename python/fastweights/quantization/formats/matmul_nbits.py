"""Weights of the ONNX operator MatMulNBits (com.microsoft)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastweights.quantization.formats import affine
from fastweights.quantization.formats.affine import Affine
from fastweights.quantization.formats.bits import pack_bits, unpack_bits
from fastweights.quantization.formats.check import FLOATS, Tensors
from fastweights.quantization.formats.layer import Layer
from fastweights.quantization.formats.rows import row_parts

__all__ = ["MatMulNBits"]

_FORMAT = "onnx"


@dataclass(frozen=True)
class MatMulNBits:
    """Inputs of a MatMulNBits node, as onnxruntime's quantizers write them.

    ``W[n, k] = scales[n, g] * (code[n, k] - zero_points[n, g])`` with ``B`` uint8
    ``[N, blocks, block_size * bits / 8]`` (a bit stream along K), ``scales`` ``[N, blocks]``,
    ``zero_points`` packed uint8 ``[N, ceil(blocks * bits / 8)]`` or floats ``[N, blocks]``, none
    meaning ``2**(bits - 1)``, and optional ``g_idx`` int32 ``[K]`` (act-order; not in newer files)
    and ``bias`` ``[N]``. ``accuracy_level`` says what a
    runtime may do with its input and is no part of the weight: 4 is activation "int8" here.

    Args:
        in_features: the node's K.
        out_features: the node's N.
        bits: 2, 4 or 8.
        block_size: inputs per scale, a power of two from 16.
        zero_points: None, "packed" or "float".
        flat: scales and zero points have one dimension, as in older files.

    Example:
        >>> import torch
        >>> from fastweights.quantization.formats import MatMulNBits
        >>> tensors = {"B": torch.full((2, 1, 16), 0x98).byte(), "scales": torch.ones(2, 1)}
        >>> MatMulNBits(in_features=32, out_features=2).read(tensors).dequantize()[0, :4]
        tensor([0., 1., 0., 1.])
    """

    in_features: int
    out_features: int
    bits: int = 4
    block_size: int = 32
    zero_points: str | None = None
    flat: bool = False

    key = "B"

    def __post_init__(self) -> None:
        for name, value in (("K", self.in_features), ("N", self.out_features)):
            if not 0 < value < 1 << 31:
                raise ValueError(f"{_FORMAT}: {name}: expected 1 to 2^31 - 1, got {value}")
        if self.bits not in (2, 4, 8):
            raise ValueError(f"{_FORMAT}: bits: expected 2, 4 or 8, got {self.bits}")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(
                f"{_FORMAT}: block_size: expected a power of two, got {self.block_size}"
            )
        affine.group_width(_FORMAT, self.bits, self.block_size, self.in_features)
        if self.zero_points not in (None, "packed", "float"):
            raise ValueError(
                f"{_FORMAT}: zero_points: expected None, packed or float, got {self.zero_points!r}"
            )

    @property
    def _blocks(self) -> int:
        return -(-self.in_features // self.block_size)

    def by_rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, those of one dimension with N as their first.

        Raises:
            ValueError: sizes that N does not divide.
        """
        n = self.out_features
        rows = {}
        for name, tensor in tensors.items():
            flat = self.flat and name in ("scales", "zero_points")
            count = tensor.numel() if flat else tensor.shape[0] if tensor.dim() else 0
            if name != "g_idx" and (count % n if flat else count != n):
                raise Tensors(_FORMAT, {}).error(name, f"{n} rows", f"{list(tensor.shape)}")
            rows[name] = tensor.reshape(n, -1) if flat else tensor
        return rows

    def read(
        self, tensors: Mapping[str, Tensor], name: str = "", *, activation: str = "float"
    ) -> Layer:
        """A layer from its tensors.

        Args:
            tensors: "B", "scales", "zero_points" if there are any, perhaps "g_idx" and "bias".
            name: of the layer, for messages.
            activation: see `fastweights.quantize`.

        Raises:
            ValueError: tensors that do not go together, values out of range.
        """
        found = Tensors(_FORMAT, tensors, name)
        n, k, blocks = self.out_features, self.in_features, self._blocks
        sizes = [n, blocks, self.block_size * self.bits // 8]
        stream = found.take("B", [torch.uint8], sizes, "[N, blocks, bytes per block]").flatten(1)
        scales = found.take_finite("scales", FLOATS, self._shape(n, blocks), "[N, blocks]")
        scales = scales.view(n, blocks)
        zero = torch.full((n, blocks), 1 << (self.bits - 1))
        if self.zero_points == "packed":
            width = -(-blocks * self.bits // 8)
            shape = self._shape(n, width)
            packed = found.take("zero_points", [torch.uint8], shape, "[N, bytes]")
            zero = unpack_bits(packed.view(n, width), self.bits, blocks)
        elif self.zero_points == "float":
            zero = found.take_finite(
                "zero_points", [scales.dtype], self._shape(n, blocks), "[N, blocks]"
            ).view(n, blocks)
        order = None
        if "g_idx" in found:
            g_idx = found.take("g_idx", [torch.int32], [k], "[in_features]")
            order = affine.input_order(found, "g_idx", g_idx, self.block_size)
        bias = found.take_bias(n)
        found.end()

        def codes(start: int, stop: int) -> Tensor:
            return unpack_bits(stream[start:stop], self.bits, k)

        source = Affine((n, k), self.bits, self.block_size, codes, scales, zero, order, bias)
        return affine.to_layer(found, source, activation)

    def write(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of a layer, filled up as by onnxruntime: codes by 0, zero points by middles.

        Args:
            layer: from `read` of this or another format, or ``Layer(quantized_tensor)``.

        Raises:
            ValueError: this format cannot hold the layer.
        """
        source = affine.from_layer(
            _FORMAT, layer, self.bits, self.block_size, integers=self.zero_points != "float"
        )
        n, k, blocks = self.out_features, self.in_features, self._blocks
        if source.shape != (n, k):
            raise ValueError(f"{_FORMAT}: expected a weight {[n, k]}, got {list(source.shape)}")
        if self.zero_points is None:
            affine.require_middle_zeros(_FORMAT, source)
        missing = blocks * self.block_size - k
        rows = [
            pack_bits(pad(source.codes(start, stop), (0, missing)), self.bits)
            for start, stop in row_parts(n, k)
        ]
        tensors = {
            "B": torch.cat(rows).view(n, blocks, -1),
            "scales": source.scale.reshape(self._shape(n, blocks)).clone(),
        }
        if self.zero_points == "packed":
            middle = 1 << (self.bits - 1)
            zeros = pad(source.zero.to(torch.uint8), (0, -blocks % (8 // self.bits)), value=middle)
            packed = pack_bits(zeros, self.bits)
            tensors["zero_points"] = packed.reshape(self._shape(n, packed.shape[1]))
        elif self.zero_points == "float":
            zero = source.zero.to(source.scale.dtype)
            tensors["zero_points"] = zero.reshape(self._shape(n, blocks))
        if source.order is not None:
            tensors["g_idx"] = affine.input_groups(_FORMAT, source)
        if source.bias is not None:
            tensors["bias"] = source.bias
        return tensors

    def _shape(self, rows: int, columns: int) -> list[int]:
        return [rows * columns] if self.flat else [rows, columns]
