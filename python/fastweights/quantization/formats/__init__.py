"""Checkpoint formats: readers and writers, one file each."""

from fastweights.quantization.formats.awq import AWQ
from fastweights.quantization.formats.compressed_tensors import CompressedTensors
from fastweights.quantization.formats.gptq import GPTQ
from fastweights.quantization.formats.layer import Layer

__all__ = ["AWQ", "CompressedTensors", "GPTQ", "Layer"]  # noqa: RUF022, acronyms are no constants
