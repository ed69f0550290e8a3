"""Short depthwise causal convolution over time."""

from fastweights.ops.causal_conv1d.functional import causal_conv1d, causal_conv1d_update

__all__ = ["causal_conv1d", "causal_conv1d_update"]
