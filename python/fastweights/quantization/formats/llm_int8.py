"""Checkpoints of bitsandbytes, 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastweights.quantization.formats import affine
from fastweights.quantization.formats.affine import Affine
from fastweights.quantization.formats.check import Tensors, setting
from fastweights.quantization.formats.layer import Layer
from fastweights.quantization.formats.rows import row_parts

__all__ = ["LLMInt8"]

_FORMAT = "bitsandbytes"
_ZERO = 128  # of the unsigned codes that other formats have


@dataclass(frozen=True)
class LLMInt8:
    """Layers of 8 bits as bitsandbytes writes them (``load_in_8bit``), one scale per output.

    ``W[n, k] = weight[n, k] * SCB[n] / 127`` with ``weight`` int8 ``[N, K]``, ``SCB`` float32
    ``[N]``, the largest magnitude of a row, ``weight_format`` uint8, 0, and an optional ``bias``
    ``[N]``. Its own rounding of activations, with the columns of outliers in floating point, is no
    part of the file; under activation "float" no input is rounded.

    Args:
        weight_format: whether layers have a ``weight_format``.

    Example:
        >>> import torch
        >>> from fastweights.quantization.formats import LLMInt8
        >>> tensors = {
        ...     "weight": torch.arange(-32, 32, dtype=torch.int8).expand(2, 64),
        ...     "SCB": torch.tensor([127.0, 254.0]),
        ... }
        >>> LLMInt8().read(tensors).dequantize()[:, 0]
        tensor([-32., -64.])
    """

    weight_format: bool = True

    key = "SCB"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LLMInt8:
        """Settings from ``quantization_config`` of config.json.

        Raises:
            ValueError: a variant that is not supported, or nonsense.
        """
        setting(_FORMAT, config, "load_in_8bit", (True,))
        setting(_FORMAT, config, "load_in_4bit", (None, False))
        return cls()

    def read(
        self, tensors: Mapping[str, Tensor], name: str = "", *, activation: str = "float"
    ) -> Layer:
        """A layer from its tensors.

        Args:
            tensors: "weight", "SCB", perhaps "weight_format" and "bias".
            name: of the layer, for messages.
            activation: see `fastweights.quantize`.

        Raises:
            ValueError: tensors that do not go together, values out of range.
        """
        found = Tensors(_FORMAT, tensors, name)
        weight = found.take("weight", [torch.int8], [None, None], "[N, in_features]")
        n, k = weight.shape
        absmax = found.take_finite("SCB", [torch.float32], [n], "[N]")
        if "weight_format" in found:
            form = found.take("weight_format", [torch.uint8], [], "a number")
            if int(form) != 0:
                raise found.error("weight_format", "0, rows of the weight", f"{int(form)}")
        bias = found.take_bias(n)
        found.end()

        def codes(start: int, stop: int) -> Tensor:
            return weight[start:stop].contiguous().view(torch.uint8) ^ _ZERO

        source = Affine((n, k), 8, -1, codes, _scale(absmax), torch.full((n, 1), _ZERO), bias=bias)
        return replace(affine.to_layer(found, source, activation), kept={"SCB": absmax.clone()})

    def write(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of a layer.

        Args:
            layer: from `read` of this or another format.

        Raises:
            ValueError: this format cannot hold the layer.
        """
        source = affine.from_layer(_FORMAT, layer, 8, -1)
        n, k = source.shape
        affine.require_middle_zeros(_FORMAT, source)
        if source.order is not None:
            raise ValueError(f"{_FORMAT}: expected inputs in their own order, got another")
        rows = [source.codes(start, stop) for start, stop in row_parts(n, k)]
        absmax = layer.kept.get("SCB")
        if absmax is None or not torch.equal(_scale(absmax), source.scale):
            absmax = (source.scale.double() * 127).float()[:, 0]
        tensors = {"weight": (torch.cat(rows) ^ _ZERO).view(torch.int8), "SCB": absmax}
        if self.weight_format:
            tensors["weight_format"] = torch.tensor(0, dtype=torch.uint8)
        if source.bias is not None:
            tensors["bias"] = source.bias
        return tensors


def _scale(absmax: Tensor) -> Tensor:
    """``[N, 1]``; float32 cannot always give SCB back."""
    return (absmax.double() / 127).float()[:, None]
