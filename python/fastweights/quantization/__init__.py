"""Quantizing whole models."""

from fastweights.quantization.swap import quantize_

__all__ = ["quantize_"]
