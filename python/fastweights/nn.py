"""Every module, flat: `fastweights.nn.<Module>`."""

from fastweights.ops.linear_attention.feature_maps import (
    DPFPFeatureMap,
    EluFeatureMap,
    HadamardFeatureMap,
    HedgehogFeatureMap,
    T2RFeatureMap,
    TaylorFeatureMap,
)
from fastweights.ops.linear_attention.gated_layers import (
    GatedLinearAttention,
    MultiScaleRetention,
)
from fastweights.ops.linear_attention.layers import LightningAttention, LinearAttention
from fastweights.ops.linear_attention.transnormer import (
    DiagAttention,
    NormAttention,
    TransNormerBlock,
)
from fastweights.ops.norms.layers import SRMSNorm
from fastweights.ops.quantization.layers import QuantizedEmbedding, QuantizedLinear, fuse_linears

__all__ = [
    "DPFPFeatureMap",
    "DiagAttention",
    "EluFeatureMap",
    "GatedLinearAttention",
    "HadamardFeatureMap",
    "HedgehogFeatureMap",
    "LightningAttention",
    "LinearAttention",
    "MultiScaleRetention",
    "NormAttention",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "SRMSNorm",
    "T2RFeatureMap",
    "TaylorFeatureMap",
    "TransNormerBlock",
    "fuse_linears",
]
