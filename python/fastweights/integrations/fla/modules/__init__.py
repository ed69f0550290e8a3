"""The parts of `fla.modules` that models of other people import, on our ops."""

from fastweights.integrations.fla.modules.convolution import (
    ShortConvolution,
    causal_conv1d,
    causal_conv1d_update,
)
from fastweights.integrations.fla.modules.norm import (
    group_norm,
    l2norm,
    layer_norm,
    layer_norm_gated,
    rms_norm,
    rms_norm_gated,
)

__all__ = [
    "ShortConvolution",
    "causal_conv1d",
    "causal_conv1d_update",
    "group_norm",
    "l2norm",
    "layer_norm",
    "layer_norm_gated",
    "rms_norm",
    "rms_norm_gated",
]
