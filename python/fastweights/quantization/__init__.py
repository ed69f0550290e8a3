"""Quantizing whole models: by nearest rounding, or calibrated on what flows through them."""

from fastweights.quantization.gptq import GPTQ
from fastweights.quantization.round_to_nearest import RoundToNearest
from fastweights.quantization.swap import quantize_

__all__ = ["GPTQ", "RoundToNearest", "quantize_"]
