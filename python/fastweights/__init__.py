"""Efficient transformers in PyTorch on the CPU."""

from fastweights import _load as _load
from fastweights import functional as functional
from fastweights import nn as nn
from fastweights import optim as optim
from fastweights import reference as reference
from fastweights._config import show_config
from fastweights.adapters.inject import adapt
from fastweights.conversion import (
    linearize,
    load,
    perplexity,
    recover,
    save,
    transfer_attention,
)
from fastweights.generation import generate, load_state, prefill
from fastweights.ops.attention.functional import (
    hybrid_attention,
    hybrid_attention_step,
    window_attention,
)
from fastweights.ops.attention.state import HybridState
from fastweights.ops.causal_conv1d.functional import causal_conv1d, causal_conv1d_update
from fastweights.ops.delta_rule.functional import delta_rule, delta_rule_step
from fastweights.ops.linear_attention.functional import linear_attention, linear_attention_step
from fastweights.ops.lora.functional import lora_linear
from fastweights.ops.norms.functional import gated_rms_norm, rms_norm
from fastweights.ops.quantization.functional import dequantize, quantize, quantized_linear
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.quantization import quantize_

__all__ = [
    "HybridState",
    "QuantizedTensor",
    "adapt",
    "causal_conv1d",
    "causal_conv1d_update",
    "delta_rule",
    "delta_rule_step",
    "dequantize",
    "gated_rms_norm",
    "generate",
    "hybrid_attention",
    "hybrid_attention_step",
    "linear_attention",
    "linear_attention_step",
    "linearize",
    "load",
    "load_state",
    "lora_linear",
    "perplexity",
    "prefill",
    "quantize",
    "quantize_",
    "quantized_linear",
    "recover",
    "rms_norm",
    "save",
    "show_config",
    "transfer_attention",
    "window_attention",
]
