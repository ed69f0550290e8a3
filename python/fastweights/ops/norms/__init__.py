"""Normalisations fused with the gate that follows them."""

from fastweights.ops.norms.functional import gated_rms_norm, rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]
