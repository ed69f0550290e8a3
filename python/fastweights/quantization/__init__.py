"""Quantizing whole models: by nearest rounding, or calibrated on text."""

from fastweights.quantization.calibrate import gptq_
from fastweights.quantization.gptq import gptq
from fastweights.quantization.swap import quantize_

__all__ = ["gptq", "gptq_", "quantize_"]
