"""Quantizing whole models: by nearest rounding, or calibrated on what flows through them."""

from fastweights.quantization.awq import AWQ
from fastweights.quantization.calibrate import Solver
from fastweights.quantization.gptq import GPTQ
from fastweights.quantization.round_to_nearest import RoundToNearest
from fastweights.quantization.smoothquant_plus import SmoothQuantPlus
from fastweights.quantization.swap import quantize_

__all__ = ["AWQ", "GPTQ", "RoundToNearest", "SmoothQuantPlus", "Solver", "quantize_"]
