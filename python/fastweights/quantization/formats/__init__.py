"""Checkpoint formats: readers and writers, one file each."""

from fastweights.quantization.formats.awq import AWQ
from fastweights.quantization.formats.bitsandbytes import BitsAndBytes4Bit
from fastweights.quantization.formats.compressed_tensors import CompressedTensors
from fastweights.quantization.formats.gguf import (
    GGUF,
    GGUFTensor,
    GGUFValue,
    read_gguf,
    write_gguf,
)
from fastweights.quantization.formats.gptq import GPTQ
from fastweights.quantization.formats.layer import Layer
from fastweights.quantization.formats.llm_int8 import LLMInt8
from fastweights.quantization.formats.matmul_nbits import MatMulNBits

__all__ = [  # noqa: RUF022, acronyms are no constants
    "AWQ",
    "BitsAndBytes4Bit",
    "CompressedTensors",
    "GGUF",
    "GGUFTensor",
    "GGUFValue",
    "GPTQ",
    "LLMInt8",
    "Layer",
    "MatMulNBits",
    "read_gguf",
    "write_gguf",
]
