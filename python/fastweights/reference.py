"""The plain-torch definition of every op, flat: `fastweights.reference.<op>`."""

from fastweights.ops.attention.reference import (
    hybrid_attention,
    hybrid_attention_step,
    window_attention,
)
from fastweights.ops.causal_conv1d.reference import causal_conv1d, causal_conv1d_update
from fastweights.ops.decoding.reference import decode_step
from fastweights.ops.delta_rule.reference import delta_rule, delta_rule_step
from fastweights.ops.linear_attention.reference import linear_attention, linear_attention_step
from fastweights.ops.lora.reference import lora_linear
from fastweights.ops.norms.reference import gated_rms_norm, rms_norm
from fastweights.ops.optim.reference import (
    dequantize_blockwise,
    dynamic_map,
    optimizer_step,
    quantize_blockwise,
)
from fastweights.ops.quantization.gptq_block_reference import gptq_block
from fastweights.ops.quantization.reference import (
    dequantize,
    dequantize_rows,
    quantize,
    quantized_linear,
)

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "decode_step",
    "delta_rule",
    "delta_rule_step",
    "dequantize",
    "dequantize_blockwise",
    "dequantize_rows",
    "dynamic_map",
    "gated_rms_norm",
    "gptq_block",
    "hybrid_attention",
    "hybrid_attention_step",
    "linear_attention",
    "linear_attention_step",
    "lora_linear",
    "optimizer_step",
    "quantize",
    "quantize_blockwise",
    "quantized_linear",
    "rms_norm",
    "window_attention",
]
