"""Which format a model's config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fastweights.quantization.formats.awq import AWQ
from fastweights.quantization.formats.bitsandbytes import BitsAndBytes4Bit
from fastweights.quantization.formats.compressed_tensors import CompressedTensors
from fastweights.quantization.formats.gptq import GPTQ
from fastweights.quantization.formats.layer import Layer
from fastweights.quantization.formats.llm_int8 import LLMInt8

__all__ = ["Format", "format_of"]


class Format(Protocol):
    """What the formats of layers in safetensors files have in common."""

    key: ClassVar[str]
    """The tensor that only a quantized layer has."""

    def read(
        self, tensors: Mapping[str, Tensor], name: str = ..., *, activation: str = ...
    ) -> Layer:
        """A layer from its tensors."""

    def write(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of a layer."""


def _bitsandbytes(config: Mapping[str, Any]) -> BitsAndBytes4Bit | LLMInt8:
    if config.get("load_in_4bit") is True:
        return BitsAndBytes4Bit.from_config(config)
    return LLMInt8.from_config(config)


_METHODS: dict[str, Any] = {
    "gptq": GPTQ.from_config,
    "awq": AWQ.from_config,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": CompressedTensors.from_config,
}


def format_of(config: Any) -> Format:
    """The format that ``quantization_config`` of a config.json describes.

    Raises:
        ValueError: a method that is not read here, a variant of it that is not, or nonsense.
    """
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(
            f"quantization_config: expected quant_method one of {sorted(_METHODS)}, "
            f"got {method!r:.80}"
        )
    form: Format = _METHODS[method](config)
    return form
