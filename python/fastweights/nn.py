"""Every module, flat: `fastweights.nn.<Module>`."""

from fastweights.ops.causal_conv1d.layers import ShortConvolution
from fastweights.ops.delta_rule.channel_layers import GatedDeltaNet2, KimiDeltaAttention
from fastweights.ops.delta_rule.layers import DeltaNet, GatedDeltaNet, GatedDeltaProduct
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
from fastweights.optim.embedding import StableEmbedding

__all__ = [
    "DPFPFeatureMap",
    "DeltaNet",
    "DiagAttention",
    "EluFeatureMap",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "HadamardFeatureMap",
    "HedgehogFeatureMap",
    "KimiDeltaAttention",
    "LightningAttention",
    "LinearAttention",
    "MultiScaleRetention",
    "NormAttention",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "SRMSNorm",
    "ShortConvolution",
    "StableEmbedding",
    "T2RFeatureMap",
    "TaylorFeatureMap",
    "TransNormerBlock",
    "fuse_linears",
]
