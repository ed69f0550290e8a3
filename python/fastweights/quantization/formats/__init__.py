"""Checkpoint formats: readers and writers, one file each."""

from fastweights.quantization.formats.gptq import GPTQ
from fastweights.quantization.formats.layer import Layer

__all__ = ["GPTQ", "Layer"]
