"""Every module, flat: `fastweights.nn.<Module>`."""

from fastweights.ops.quantization.layers import QuantizedEmbedding, QuantizedLinear, fuse_linears

__all__ = [
    "QuantizedEmbedding",
    "QuantizedLinear",
    "fuse_linears",
]
